"""VeRL and vLLM on a machine without a GPU: what our tests run, the same trainer and servers as elsewhere.

    platform     VeRL's platform plugin: what a device is, where there is none
    vllm_worker  new weights into vLLM's CPU build, which packs them
    metadata     the name of a package that vLLM looks itself up by

Nothing of VeRL or vLLM is changed: each part hangs on a hook of theirs. Not meant for training at scale.
"""
