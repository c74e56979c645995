"""What `copra-fl probe` measures on finished runs, a file a probe; `opening` and `page` are for all of them.

Each probe is a function from opened runs to `page.Findings`; its mathematics are pure functions beside it.
"""
