"""This package decides what will run, before anything starts.

The options of a video take this path through the modules of this package:

    request_files     the command line, --from and the lines of --jobs become requests
    requests          plans each request, and places all plans together
      resolve           makes one plan, with these modules:
        image_inputs      what the images and the earlier video are (prompt_extension: a program writes the prompt)
        completed         the model and the machine give all other options (devices: the device, and what it can do)
        plan              what will be computed (skips: the forwards that MagCache skips)
        notes             what could surprise the user
      placement         the mesh of ranks, and where the weights lie
    plan_json, job    the plan as JSON: for the user, and for the ranks

Other modules are used after the plan. While the ranks work, `share` gives them jobs, and `progress` says what is done.
When a video is finished, `sidecar` writes its .json, and `past_runs` stores its seconds in order to predict the seconds
of later runs.
`shortened` makes a plan cheap enough for a warm-up or a measurement. `wanfast doctor` shows what `memory_fit` and
`next_step` find.

This package does not import torch.
"""
