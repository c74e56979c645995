"""Run the Flower app on this machine or a Ray cluster.

recipes.py            recipe, method and --set to configurations
run_folder.py         choose and create the output folder
preflight.py          check configurations and prepare data before anything starts
capacity.py           compare the memory and GPUs that a run needs with those of this machine
single_run.py         one run
comparison.py         several methods and seeds in one Flower run
study.py              the table [study] of a recipe: grids of comparisons, and their learning rates
superlink.py          a private SuperLink in simulation mode, with Ray underneath
private_superlink.py  that SuperLink, which answers its own user only
waiting_flwr.py       the command `flwr`, imported before its arguments are known
guard.py              kills all processes of a run when the command ends
ray_cluster.py        choose workers on this machine or on a Ray cluster
inspect_ray.py        a script that inspects the machines of a Ray cluster
progress.py           show the progress of a run
"""
