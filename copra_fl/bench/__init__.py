"""Whether our engine is fast: contestants that train the same clients to the same adapters, timed in one run.

    sizes        what is trained: three sizes, a warm-up and two local trainings each
    usual        the training loop with PEFT as its users write it
    workers      contestants in processes of our own: the usual loop, our engine
    simulations  contestants over Flower and Ray: ours, and experiments/bench
    contest      who competes, the equality gate, the repeats, growth with more clients
    sampling     CPU seconds and memory of a contestant's processes
    flops        what a training step must compute
    steps        what CopRA saves of a step over its schedule, measured and in closed form
    findings     results to facts and tables, and to the targets that they meet or miss
    summary      facts to the few numbers of --json, and to what was left out
    figures      facts to charts
    report       facts to a page

Protocol: each contestant first runs once in every division of the cores (N workers of 1 thread, 1 worker of N), with
memory watched and not timed for the record. Its final adapters must agree with those of the plain sequential
reference, or the command ends with an error. Then all take turns, each in its faster division, as often as asked.
Only ratios from one such run are worth quoting.
"""
