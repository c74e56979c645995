"""The Flower ServerApp; `server.runs` does the work.

Nothing large is imported before the app runs: Flower holds a lock while it imports an app, and starts Ray afterwards.
"""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from copra_fl import logs
from server import delivery

logs.configure()
delivery.replace_polling()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from server import runs

    runs.main(grid, context)
