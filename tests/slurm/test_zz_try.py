import sys, time, subprocess
from pathlib import Path
def test_race(slurm, module_trainer):
    c=str(module_trainer.config("wrong"))
    cmd=[sys.executable,"pretrain_pints.py",c,"--model.num_attention_heads","3"]
    n=0; outs=[]
    for i in range(25):
        d=slurm.run("srun","-N2","-n4","--kill-on-bad-exit=1","--label",*cmd)
        if d.stderr.count("error: model.num_att")!=1: n+=1; outs.append((d.returncode,d.stderr))
    print("told not once:",n); print(*outs[:4],sep="\n")
    outs=[];n=0
    for i in range(6):
        d=slurm.run("srun","-N2","-n4","--kill-on-bad-exit=1","--label",sys.executable,"-c","import os,sys,time\nif os.environ['SLURM_PROCID']=='0': time.sleep(0.3); print('told',flush=True)\nsys.exit(2)")
        outs.append((d.returncode,d.stdout,d.stderr))
    print(*outs[:6],sep="\n")
