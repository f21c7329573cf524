"""Runs a command of paceline, kills it with SIGKILL at random moments spread over the run, and runs it to its end.

    python kills.py KILLS ARGUMENTS...

One process imports everything once and forks a child for every attempt. In the arguments "{}" stands for the
trial's name: "reference" is run undisturbed, "trial0" is killed again and again, and if it ends before it was
killed often enough, "trial1" follows.
Prints the number of trials.
"""

import os
import random
import signal
import sys
import time

import torch
from paceline.spec import cli
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401


def start(arguments):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os._exit(cli.main(arguments))
    return pid


def finish(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"exit code {code}"


def main():
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    begun = time.perf_counter()
    finish(start([part.replace("{}", "reference") for part in arguments]))
    whole, trial, landed = time.perf_counter() - begun, 0, 0
    chance = random.Random(kills)
    while landed < kills:
        own = [part.replace("{}", f"trial{trial}") for part in arguments]
        while landed < kills:
            pid = start(own)
            time.sleep(chance.uniform(landed, landed + 1) / kills * 0.7 * whole)
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                whole *= 0.8  # there was little left to do, or it is quicker by now
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            landed += 1
        finish(start(own))
        trial += 1
    print(trial)


if __name__ == "__main__":
    main()
