"""A page in the browser for a run, while it goes on and after it: `python -m ddil_dist.dashboard`.

`watch` looks at runs, `panels` draws what they are at now, `pages` puts that above the run's report, `server` answers
browsers. Everything is read; nothing is changed. The page loads nothing but itself.

It is the standard library's HTTP server with server-sent events, and the report's own sections and charts: one drawing
of every figure, no package more, and no JavaScript but a page of it that swaps in what the server sends.
"""
