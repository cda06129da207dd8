"""A web page that follows runs in progress. It only reads their folders.

log_follower.py    the rows of a training log that grows
followed_run.py    one run folder as JSON: curves, experts, timeline, samples and events
watch_server.py    HTTP server of the page and the JSON
watch_page.html    the page, which loads nothing else
"""
