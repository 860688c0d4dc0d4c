#!/bin/bash
# Made by `shardwright launch launcher=slurm`. Slurm needs the log's folder before:
# mkdir -p /fsx/me/runs/mine/logs
#SBATCH --job-name=mine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account=nlp
#SBATCH --qos=high
#SBATCH --constraint=p5|p4d
#SBATCH --time=1-00:00:00
#SBATCH --exclusive
#SBATCH --output=/fsx/me/runs/mine/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --mem=0
#SBATCH --comment="it's #1"
#SBATCH --reboot

logs=/fsx/me/runs/mine/logs
cd -- /fsx/me || exit 2
restarts=${SLURM_RESTART_COUNT:-0} time_is_up='' cancelled='' step=''
trap 'time_is_up=1; kill -USR1 "$step" 2> /dev/null || :' USR1 # srun passes it on to every process
trap 'cancelled=1' TERM # a job that was taken back would start again, if it were asked to
# An array's number alone would mean all of its jobs.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID}
echo "--- $(date -u +%FT%TZ) job $job on $SLURM_JOB_NODELIST, started again $restarts times"
fail() { echo "launch: $1" >&2; exit 2; }
mkdir -p "$logs" || fail "$logs can't be written here; is it on a disk that all nodes share? (run.dir)"
if ((restarts > 100)); then
    echo "launch: started again more than 100 times (launcher.max_requeues)." >&2
    exit 1
fi

words=(
    trainer.max_steps=9
    'model.name='"'"'a $b'"'"''
    run.dir=/fsx/me/runs/mine
    run.name=null
)

export NCCL_DEBUG=INFO
export NOTE='a $b '"'"'c'"'"''
set -eE
trap 'fail "the set-up failed at: $BASH_COMMAND (launcher.setup)."' ERR
module load cuda
trap - ERR
set +eE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-12}"
export SHARDWRIGHT_GRACE_S=300
export SHARDWRIGHT_ENDS="$logs/ended-$SLURM_JOB_ID-$restarts"

worker='
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE TORCHELASTIC_RUN_ID MASTER_ADDR MASTER_PORT # of another launcher, or of a hook of the container
trap : USR1 TERM INT # these are for the process below; this shell waits for its end
"$@"
code=$?
if [ $code -ne 0 ]; then : > "$SHARDWRIGHT_ENDS.$code"; fi
if [ $code -eq 0 ] || [ $code -eq 75 ]; then exit 0; fi
if [ "$SLURM_STEP_NUM_TASKS" -gt 1 ]; then sleep 30; fi # the others say why, and end by themselves
exit $code
'

options=(
    --cpus-per-task=12
    --kill-on-bad-exit=1
    --wait=0
    --export=ALL
    --container-image=/fsx/image.sqsh
    --container-mounts=/fsx/data:/data:ro,/scratch:/scratch,/fsx/me:/fsx/me
    --container-workdir=/fsx/me
    --mpi=pmix
)
if [[ -d /opt/sagemaker_cluster ]]; then # SageMaker HyperPod replaces a broken node and repeats the step
    options+=(--auto-resume=1)
fi

code=138
if [[ ! $time_is_up ]]; then
    srun "${options[@]}" sh -c "$worker" worker python3 -u /fsx/me/train.sh "${words[@]}" &
    step=$!
    while wait "$step"; code=$?; ((code > 128)) && kill -0 "$step" 2> /dev/null; do :; done
fi
for noted in 1 2; do # srun says 137 where it ended the others
    if ((code)) && [[ -e $SHARDWRIGHT_ENDS.$noted ]]; then code=$noted; fi
done
if ((! code)) && [[ -e $SHARDWRIGHT_ENDS.75 ]]; then code=75; fi
rm -f "$SHARDWRIGHT_ENDS".*

go_on() {
    if [[ $cancelled ]]; then
        return
    elif ((restarts >= 100)); then
        echo "launch: $1; not again, after 100 times (launcher.max_requeues)." >&2
    elif scontrol requeue "$job"; then
        echo "launch: $1; the job waits to go on"
    fi
}
if [[ $time_is_up ]] && ((code == 75 || code == 138)); then
    code=75
    go_on "the time is up"
elif ((code == 75)) && [[ $(scontrol --oneliner show job "$job") == *" PreemptTime=2"* ]]; then
    # Slurm requeues a job that stays until the end of its grace, but not one that has left in good order.
    go_on "a job of higher priority takes its place"
elif ((code && code != 2 && code != 75 && SLURM_JOB_NUM_NODES > 1)); then
    # Slurm takes minutes to miss a node, and would take this for the job's own failure.
    alone=(--overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    timeout 120 srun "${alone[@]}" true || go_on "a node doesn't answer"
fi
exit $code
