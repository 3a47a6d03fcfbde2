"""`python -m redvtp.gpucheck`: one command that says whether a card computes what it should, and how fast.

Each part is a file of checks over the machine (`Machine`): `golden_runs`, `attention`, `kernels`, `sampling`, and
`speed` with what that needs. They add to one `Report`.
"""
