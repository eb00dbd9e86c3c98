#!/usr/bin/env bash
# Trains the experts and then the decoder on one H200, with as many steps as end in time, and exports FOLDER/tiny.
#
#   bash training/experts.sh FOLDER EXPERTS_END END [OPTION...]     # two times, in seconds since 1970
#
# Each OPTION goes to `python3 -m training`, such as `--start DIR` to train the experts of a model further. While the
# clips are encoded, `training.compiled` looks for ways of compiling whose gradients are right. The learning rate decays
# over the last half of the steps (with --start, over all of them), so their number must be known before the first one.
# It comes from the seconds that a step takes. If gradients are wrong nevertheless, the stage ends, and the next way
# continues from its checkpoint, at last without compilation.
# END equal to EXPERTS_END leaves the decoder as it is.
set -u
folder=$1 experts_end=$2 end=$3
shift 3
options=("$@")
smoke=()
for option in "${options[@]}"; do [ "$option" != --smoke ] || smoke=(--smoke aot_eager none); done
left() { echo $(($1 - $(date +%s))); }
train() { python3 -m training --folder "$folder" --minutes "$(python3 -c "print($(left "$limit") / 60)")" "${options[@]}" "$@"; }
steps() { python3 -c "print(max(500, int(($(left "$1") - $2) / $3)))"; } # END, seconds before the first step, seconds a step
seconds() { case $1 in none | aot*) echo 0.0565 ;; no_fusion) echo 0.045 ;; *) echo 0.033 ;; esac; } # a step of a way

limit=$experts_end
mkdir -p "$folder"
# An earlier call may have left a checkpoint, the ways and the number of its steps.
if [ ! -e "$folder/experts.pt" ]; then
  python3 -m training.compiled "${smoke[@]}" > "$folder/ways" &
  train --stage experts --expert-steps 0 && rm "$folder"/experts.* # encodes the clips
  wait
fi
for way in $(cat "$folder/ways") none; do
  [ "$(left "$experts_end")" -gt 60 ] || break
  echo "experts: way $way"
  [ -e "$folder/experts.pt" ] || steps "$experts_end" 60 "$(seconds "$way")" > "$folder/expert-steps"
  train --stage experts --expert-steps "$(cat "$folder/expert-steps")" --way "$way" && break
done
limit=$((end + 60))
train --stage export --expert-steps 1 # also of an unfinished stage
[ "$end" -gt "$experts_end" ] || exit 0
train --stage vae-decoder --decoder-steps "$(steps "$end" 75 0.042)" && train --stage export --expert-steps 1
