#!/usr/bin/env bash
# Trains the experts and then the decoder on one H200, with as many steps as end in time, and exports FOLDER/tiny.
# With --start and two GPUs, each expert learns alone on one of them.
#
#   bash training/experts.sh FOLDER EXPERTS_END END [OPTION...]     # two times, in seconds since 1970
#
# Each OPTION goes to `python3 -m training`, such as `--start DIR` to train the experts of a model further. While the
# clips are encoded, `training.compiled` looks for ways of compiling whose gradients are right. The learning rate decays
# over the last half of the steps (with --start, over all of them), so their number must be known before the first one.
# It comes from the seconds that a step takes. If gradients are wrong nevertheless, the stage ends, and the next way
# continues from its checkpoint, at last without compilation.
# END equal to EXPERTS_END leaves the decoder as it is. An empty file FOLDER/ways trains without compilation.
set -u
folder=$1 experts_end=$2 end=$3
shift 3
options=("$@")
smoke=()
for option in "${options[@]}"; do [ "$option" != --smoke ] || smoke=(--smoke aot_eager none); done
left() { echo $(($1 - $(date +%s))); }
train() { python3 -m training --folder "$folder" --minutes "$(python3 -c "print($(left "$limit") / 60)")" "${options[@]}" "$@"; }
steps() { python3 -c "print(max(500, int(($(left "$1") - $2) / $3)))"; } # END, seconds before the first step, seconds a step
seconds() { # a step of a way, of both experts or of one
  case $1 in none | aot*) pace=0.0565 ;; no_fusion) pace=0.045 ;; *) pace=0.033 ;; esac
  [ "$2" = experts ] && echo $pace || python3 -c "print($pace / 2)"
}
learn() { # NAME of the checkpoint, OPTION...
  name=$1
  shift
  for way in $(cat "$folder/ways") none; do
    [ "$(left "$experts_end")" -gt 60 ] || break
    echo "$name: way $way"
    [ -e "$folder/$name.steps" ] || steps "$experts_end" 45 "$(seconds "$way" "$name")" > "$folder/$name.steps"
    train --stage experts --expert-steps "$(cat "$folder/$name.steps")" --way "$way" "$@" && break
  done
}
on() { CUDA_VISIBLE_DEVICES=$1 "${@:2}"; } # GPU, COMMAND...

limit=$experts_end
mkdir -p "$folder"
pair=
[[ " ${options[*]} " != *" --start "* || $(nvidia-smi -L 2>&1 | grep -c UUID) -lt 2 ]] || pair=yes
# An earlier call may have left checkpoints, the ways and the numbers of their steps.
if ! compgen -G "$folder/experts*.pt" > /dev/null; then
  [ -e "$folder/ways" ] || python3 -m training.compiled "${smoke[@]}" > "$folder/ways" &
  # encodes the clips, half of the work on each GPU
  [ -z "$pair" ] || { on 1 train --stage experts --encode 3 5 & on 0 train --stage experts --encode 0 1 2 4; }
  [ -n "$pair" ] || { train --stage experts --expert-steps 0 && rm "$folder"/experts.*; }
  wait
fi
if [ -n "$pair" ]; then
  on 0 learn experts-high_noise --learning high_noise &
  on 1 learn experts-low_noise --learning low_noise
  wait
else
  learn experts
fi
limit=$((end + 60))
train --stage export --expert-steps 1 # also of an unfinished stage
[ "$end" -gt "$experts_end" ] || exit 0
train --stage vae-decoder --decoder-steps "$(steps "$end" 75 0.042)" && train --stage export --expert-steps 1
