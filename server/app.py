"""The Flower ServerApp; `server.runs` does the work.

Nothing large is imported before the app runs: Flower holds a lock while it imports an app, and starts Ray afterwards.
"""

from __future__ import annotations

import sys

# In a simulation, Flower's main thread removes a folder from sys.path meanwhile (`object_ref.validate`). An import that
# walks the list at that moment skips one entry, so list each entry twice.
sys.path.extend(sys.path)

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from copra_fl import events, logs
from server import delivery

logs.configure()
delivery.replace_polling()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    events.emit("stage", text="starting the server app")
    from server import runs

    runs.main(grid, context)
