
export INCUBATE_DATA={{ data | quote }} INCUBATE_STOP={{ folder | quote }}/STOP-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
again() {   # not what somebody cancelled
  timeout 60 scontrol requeue Incomplete "$SLURM_JOB_ID"
  out_of_time
}
out_of_time() {   # Slurm ends such a job for good, unless it is requeued before it is gone
  if [ "$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %r)" = TimeLimit ]; then timeout 60 scontrol requeue "$SLURM_JOB_ID"; fi
}
{% if is_phase -%}
# a warning: the phase sees the file after the next step, saves and ends; if it is not at its steps yet, time may run out
trap 'touch "$INCUBATE_STOP"; (sleep {{ [1, slurm.warn_seconds // 2] | max }}; again) &' USR2
trap 'touch "$INCUBATE_STOP"; out_of_time' TERM
{% else -%}
trap : USR2   # an analysis saves nothing: one that time does not suffice for would begin for ever
{% endif -%}
{{ slurm.prologue | join("\n") }}
about={{ about | quote }}
job=({{ slurm.python or interpreter | quote }} -m incubate_lib.backends.slurm.job)
{% if job.nodes == 1 -%}
{# a step of its own, because preemption warns steps only; of a phase over several nodes the ranks are one -#}
srun --overlap --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" {% endif -%}
"${job[@]}" attempt "$about" &
step=$!
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done   # a signal ends `wait`, not the step
wait "$step"; code=$?
[ "$code" -eq 0 ] && exit 0
"${job[@]}" verdict "$about" "$code"
verdict=$?
[ "$verdict" -eq {{ again }} ] || exit "$verdict"
for try in $(seq 240); do again; sleep 30; done   # the controller may be away
exit 1
