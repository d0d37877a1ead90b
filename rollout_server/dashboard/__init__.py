"""What the dashboard shows: collected here (``feed``), sent by ``api/dashboard.py``, drawn by
the static files in ``page/``.

Everything is bounded: points, groups, tokens and listeners. Nothing here asks an engine anything;
the status poller fetches engines' decisions while somebody looks.
"""
