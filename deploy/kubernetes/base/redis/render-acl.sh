#!/bin/sh
# Write Redis's ACL file with the digests of the passwords, one file a user.
# Usage: render-acl.sh TEMPLATE DIRECTORY_OF_PASSWORDS TARGET
set -eu
umask 077
text=$(cat "$1")
for user in run operator monitor; do
    password=$(cat "$2/$user")
    test -n "$password" || { echo "render-acl.sh: $2/$user is empty" >&2; exit 1; }
    digest=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
    text=$(printf %s "$text" | sed "s/@$user@/$digest/")
done
printf '%s\n' "$text" > "$3"
