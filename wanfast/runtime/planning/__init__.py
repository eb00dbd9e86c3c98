"""This package decides what will run, before anything starts.

The options of a video take this path through the modules of this package. A module calls those that stand below it,
one step to the right:

    request_files         reads the options of each video from the command line and from files
    requests              plans all videos
      resolve               makes the plan of one video
        image_inputs          reads the sizes of the images, and of the video that is continued
        completed             sets all options that the user did not give
          devices               decides the device and the number of GPUs
        plan                  computes the geometry and the steps
          skips                 chooses the forwards that MagCache skips
        prompt_extension      lets a program of the user write the prompt
        notes                 writes notes on what could surprise the user
      placement             decides the mesh of ranks, and where the weights lie
    plan_json             writes the plan as JSON for the user
    job                   writes the plan as JSON for the ranks

Other modules are used after the plan. While the ranks work, `share` gives them jobs, and `progress` says what is done.
When a video is finished, `sidecar` writes its .json, and `past_runs` stores its seconds in order to predict the seconds
of later runs.
`shortened` makes a plan cheap enough for a warm-up or a measurement. `wanfast doctor` shows what `memory_fit` and
`next_step` find.

This package does not import torch.
"""
