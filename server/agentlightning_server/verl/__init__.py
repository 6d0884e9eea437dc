"""VeRL as the engine: its own trainer, vLLM and Ray, unmodified, fed by our rollouts.

    run         server, runner and all below: `agl train`       rows        episodes -> rows, weights
    serve       vLLM alone, behind the gateway: `agl serve`     collecting  prompts -> rollouts -> rows
    doctor      what stands in the way, beforehand              transfer    rows -> VeRL's TransferQueue
    config      VeRL's settings: a file, ours, a CPU's          bridge      the actor that does both
    launch      Ray, the trainer, and watching both             manager     where VeRL asks for rollouts
    engine      the gateway's view of VeRL's vLLM servers       estimator   our advantages and loss
    reading     what VeRL logged -> records of a run            dataset     tasks in our order
    names       by which VeRL's processes find all this         cpu         VeRL and vLLM without a GPU

Only this package speaks VeRL's types. Nothing here is imported unless VeRL is asked for.
"""
