"""The benchmark of `copra-fl bench`: competitors train the same clients to the same adapters, and are timed.

    sizes          the workloads: a warm-up and two local trainings of each size
    gpu            size gpu: many small clients of a language model on one device
    population     size clients: time and memory by phase, from 100 to 100,000 clients
    peft_baseline  the training loop with PEFT as its users write it
    workers        competitors in worker processes: the PEFT baseline and the engine of this package
    simulations    competitors over Flower and Ray: the apps of this package, and experiments/bench
    runner         the list of competitors, the equality check, the repeats, scaling with the number of clients
    sampling       CPU seconds and memory of a competitor's processes
    flops          floating point operations of a training step
    steps          the share of a step that CopRA saves over its schedule, measured and in closed form
    findings       results as plain data and tables, and the verdict on each target
    summary        the numbers of --json, and the parts that were left out
    verdict        a benchmark in sentences
    figures        charts; those of size clients are in population_figures
    report         the page

Protocol: each competitor first runs once in every split of the cores (N workers of 1 thread, 1 worker of N threads);
this run measures memory and not time. Its adapters must agree with those of the plain sequential reference, otherwise
the command ends with an error. Then all competitors take turns, each in its faster split, for every repeat. Only ratios
within one such run are meaningful.
"""
