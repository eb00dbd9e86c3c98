#!/usr/bin/env bash
# Trains the experts and then the decoder on one H200, with as many steps as end in time, and exports FOLDER/tiny.
#
#   bash training/experts.sh FOLDER EXPERTS_END END [OPTION...]     # two times, in seconds since 1970
#
# Each OPTION goes to `python3 -m training`. The learning rate decays over the last half of the steps, so their number
# must be known before the first one. It comes from the seconds that a step takes. If compiled gradients differ from
# those without compilation (LOG.md), the stage ends, and the next way of compiling continues from its checkpoint.
set -u
folder=$1 experts_end=$2 end=$3
shift 3
options=("$@")
left() { echo $(($1 - $(date +%s))); }
train() { python3 -m training --folder "$folder" --minutes "$(python3 -c "print($(left "$limit") / 60)")" "${options[@]}" "$@"; }
steps() { python3 -c "print(max(500, int(($(left "$1") - $2) / $3)))"; } # END, seconds before the first step, seconds a step

limit=$experts_end
# Encodes the clips. An earlier call may have left a checkpoint, and the number of its steps.
[ -e "$folder/experts.pt" ] || { train --stage experts --expert-steps 0 && rm "$folder"/experts.*; }
for way in "TORCH_COMPILE_DISABLE=0 0.0305" "TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 0.0305" "TORCH_COMPILE_DISABLE=1 0.05"; do
  [ "$(left "$experts_end")" -gt 60 ] || break
  export "${way% *}"
  echo "experts: ${way% *}"
  [ -e "$folder/experts.pt" ] || steps "$experts_end" 80 "${way#* }" > "$folder/expert-steps"
  train --stage experts --expert-steps "$(cat "$folder/expert-steps")" && break
done
limit=$((end + 60))
train --stage export --expert-steps 1 # also of an unfinished stage
train --stage vae-decoder --decoder-steps "$(steps "$end" 75 0.028)" && train --stage export --expert-steps 1
