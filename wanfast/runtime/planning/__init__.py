"""This package decides what will run, before anything starts.

The options of a video go through these modules of the package, from top to bottom. A module calls the modules that are
indented below it:

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

The other modules are:

    share                 gives jobs to the ranks
    progress              computes which share of a video is done
    sidecar               writes the .json of a finished video
    past_runs             stores the seconds of finished videos, and predicts the seconds of later runs
    shortened             makes a plan cheap enough for a warm-up or a measurement
    memory_fit            computes for `wanfast doctor` whether a model fits on this machine
    next_step             finds for `wanfast doctor` the command that the user should type next

This package does not import torch.
"""
