#!/usr/bin/env bash
# Trains the experts, and then the decoder, with as many steps as end in time on an H200, and exports FOLDER/tiny.
#
#   bash training/experts.sh FOLDER EXPERTS_END END [OPTION...]     # two times, in seconds since 1970
#
# Each OPTION goes to `python3 -m training`, such as `--start DIR` to train the experts of a model further. With --start
# and two GPUs, each expert learns alone on one of them, in half the time.
# The learning rate decays over the last half of the steps (with --start, over all of them), so their number must be
# known before the first one. It comes from the seconds that a step takes. An earlier call may have left checkpoints and
# the numbers of their steps; then this one continues.
# END equal to EXPERTS_END leaves the decoder as it is.
set -u
folder=$1 experts_end=$2 end=$3
shift 3
options=("$@")
left() { echo $(($1 - $(date +%s))); }
train() { python3 -m training --folder "$folder" --minutes "$(python3 -c "print($(left "$limit") / 60)")" "${options[@]}" "$@"; }
steps() { python3 -c "print(max(500, int(($(left "$1") - $2) / $3)))"; } # END, seconds before the first step, seconds a step
learn() { # NAME of the checkpoint, seconds a step, OPTION...
  [ -e "$folder/$1.steps" ] || steps "$experts_end" 45 "$2" > "$folder/$1.steps"
  train --stage experts --expert-steps "$(cat "$folder/$1.steps")" "${@:3}"
}
ended() { [ "$1" = 0 ] || [ "$1" = 75 ] || exit "$1"; } # an unfinished stage is exported too, but not a failed one
both() { # two COMMANDs at the same time
  $1 &
  first=$!
  $2
  second=$?
  wait $first || ended $?
  ended $second
}
on() { CUDA_VISIBLE_DEVICES=$1 "${@:2}"; } # GPU, COMMAND...

limit=$experts_end
mkdir -p "$folder"
if [[ " ${options[*]} " == *" --start "* && $(nvidia-smi -L 2>&1 | grep -c UUID) -ge 2 ]]; then
  both "on 0 train --stage experts --encode 0 1 2 4" "on 1 train --stage experts --encode 3 5" # half of the work each
  both "on 0 learn experts-high_noise 0.0282 --learning high_noise" "on 1 learn experts-low_noise 0.0282 --learning low_noise"
else
  train --stage experts --encode 0 1 2 3 4 5 || exit
  learn experts 0.0565 || ended $?
fi
limit=$((end + 60))
train --stage export --expert-steps 1 || exit
[ "$end" -eq "$experts_end" ] || { train --stage vae-decoder --decoder-steps "$(steps "$end" 75 0.042)" && train --stage export --expert-steps 1; }
