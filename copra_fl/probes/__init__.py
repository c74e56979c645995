"""Probes: the measurements of `copra-fl probe` on finished runs.

A module named as a command is the command: its function `probe` takes opened runs and returns `findings.Findings`. The
mathematics stand beside it as pure functions of adapters: `merging` for `merge`, `shapley_values` for `shapley`,
`pruned_adapters` for `prune`, `copra_fl.adapters.interpolation` for `connectivity`. All probes share `open_run`,
`members`, `exported`, `charts` and `findings`.
"""
