"""``layerskip serve``: an HTTP server in the form of OpenAI's API, on one `Session`.

`engine` has the thread that owns the session; `app` has the routes, which check fields and write answers.
"""
