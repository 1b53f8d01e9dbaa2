"use strict";
const stream = new EventSource(location.pathname.replace(/\/$/, "") + "/events");
stream.addEventListener("now", (event) => {
  document.getElementById("now").innerHTML = JSON.parse(event.data);
  document.body.classList.remove("away");
});
stream.addEventListener("report", async () => {
  const answer = await fetch(location.pathname);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const open = new Set([...document.querySelectorAll("#report details[open] > summary")].map((each) => each.textContent));
  document.getElementById("report").replaceWith(page.getElementById("report"));
  for (const summary of document.querySelectorAll("#report details > summary"))
    summary.parentElement.open = open.has(summary.textContent);
});
stream.addEventListener("error", () => document.body.classList.add("away"));
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const command = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren(command); // no clipboard here: it is marked, to be copied by hand
  }
});
