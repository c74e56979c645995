"""The SuperLink of a simulation, which answers its own user only: `flower-superlink` behind the API gate.

python -m copra_fl.simulation.private_superlink [FLOWER-SUPERLINK-ARGS...]

Other users of a shared machine reach its port too, and whoever submits a run there runs code as the one who simulates.
"""

from __future__ import annotations

import sys

from copra_fl.deployment import gated_superlink
from copra_fl.deployment.api_gate import admit_no_node

if __name__ == "__main__":
    gated_superlink.run(sys.argv[1:], admit_no_node)
