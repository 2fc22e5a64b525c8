"""Every fault, what is promised about it, how often it is tried, and which protection makes the difference."""

import dataclasses
from collections.abc import Callable

from lmjax.chaos import disks, insides, kills
from lmjax.chaos.lab import Lab, Outcome


@dataclasses.dataclass(frozen=True)
class Fault:
    """promise: a number of the issue's list in docs/reliability.md. tries: in a full round. protection: taken out of
    the run by `lmjax.chaos.child`, the fault must do harm; "" where no single one can be taken out. few: one try of it
    belongs to the quick round. each: faults that a try injects."""

    run: Callable[[Lab], Outcome]
    what: str
    promise: str
    tries: int = 1
    protection: str = ""
    few: bool = False
    each: int = 1

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")


K, D, N = kills, disks, insides
RESUMES = "the same command ends the run with the same bits and record"
FAULTS = (
    Fault(K.kill_single, "kill -9 at a random moment", RESUMES, 60, "rewind"),
    Fault(K.kill_while_saving, "kill -9 while a checkpoint is written", RESUMES, 20, "", True),
    Fault(K.kill_five_times, "kill -9 five times in one run", RESUMES, 2, each=5),
    Fault(K.kill_rank_of_two, "kill -9 of the second of 2 processes",
          "the other ends by itself; " + RESUMES, 8),
    Fault(K.kill_leader_of_two, "kill -9 of the first of 2 processes", "the other ends by itself; " + RESUMES, 8),
    Fault(K.kill_rank_of_four, "kill -9 of one of 4 processes", "the others end by themselves; " + RESUMES, 4),
    Fault(K.kill_all_of_four, "kill -9 of 4 processes at once", RESUMES, 2),
    Fault(K.terminate, "SIGTERM", "saves that step, exit 143, no step repeated", 6, "signals"),
    Fault(K.interrupt, "Ctrl-C", "saves that step, exit 130, no step repeated", 3),
    Fault(K.terminate_one_of_two, "SIGTERM to one of 2 processes", "all save the same step, exit 143", 4),
    Fault(K.terminate_twice, "a second SIGTERM during the last save", "ends at once; " + RESUMES, 4),
    Fault(K.stop_rank, "SIGSTOP of one of 2 processes", "the peer ends within 30 s; " + RESUMES, 1),
    Fault(K.orphans, "kill -9 of a process with workers", "no worker is alive 5 s later", 1),
    Fault(K.out_of_memory, "no more memory", RESUMES, 2),
    Fault(D.flipped_bit, "one bit of a checkpoint's arrays flipped",
          "named, set aside; " + RESUMES, 4, "manifest", True),
    Fault(D.flipped_bit_anywhere, "one bit of any of its files flipped", "named, set aside; " + RESUMES, 3),
    Fault(D.truncated, "one of its files truncated", "named, set aside; " + RESUMES, 3),
    Fault(D.deleted, "one of its files deleted", "named, set aside; " + RESUMES, 3),
    Fault(D.emptied, "its folder emptied", "named, set aside; " + RESUMES, 1),
    Fault(D.power_cut, "its files full of zeros (power cut)", "named, set aside; " + RESUMES, 1),
    Fault(D.flips_by_the_hundred, "100 flips, truncations, deletions", "every one is found", 3, each=100),
    Fault(D.strays, "folders that are no checkpoints", "passed over", 1),
    Fault(D.full_disk, "disk full for a while", "training goes on, and saves again when there is room", 2, "patience"),
    Fault(D.sync_error, "fsync gives EIO once", "training goes on; that save is told", 3),
    Fault(D.rename_error, "rename gives EIO once", "training goes on; that save is told", 3),
    Fault(D.slow_disk, "fsync takes 60 ms", "saves are left out rather than waited for", 1),
    Fault(D.read_only_disk, "file system becomes read-only", "exit 4 after a few failed saves; " + RESUMES, 2),
    Fault(D.dead_disk, "fsync never returns", "exit 6 within the limit; " + RESUMES, 2, "watchdog"),
    Fault(D.checkpoints_removed, "checkpoints deleted during the run", "later saves make the folder anew", 1),
    Fault(D.torn_record, "torn metrics.jsonl, garbled lease", RESUMES, 2),
    Fault(D.clock_jump, "files dated years ahead", "the highest step is used; " + RESUMES, 1),
    Fault(D.compiled_damaged, "kept compiled program damaged", "compiled again; " + RESUMES, 2),
    Fault(D.second_trainer, "the same command twice at once", "the second is refused", 2, "lease"),
    Fault(N.nan_gradient, "NaN in one gradient", "that update is skipped; a kill changes no bit", 3, "guard"),
    Fault(N.nan_for_good, "NaN from one step on", "exit 5 with the first bad tensor; nothing bad is saved", 2, "guard"),
    Fault(N.spike, "three gradients 10,000 times too large",
          "skipped on the device; a kill changes no bit", 2, "guard"),
    Fault(N.spike_that_stays, "25 bad batches", "goes back and jumps over them; a kill changes no bit", 2, "guard"),
    Fault(N.wrong_copy, "one bit of one device's weight flips", "exit 7, array and device named", 1, "recheck"),
    Fault(N.wrong_once, "a step comes out wrong once", "run again, the right result is kept", 2, "recheck"),
    Fault(N.wrong_always, "a step never comes out twice the same",
          "exit 7 before it is saved; " + RESUMES, 1, "recheck"),
    Fault(N.hang, "Python hangs in a step",
          "phase named, stacks, exit 6 in limit + 5 s; " + RESUMES, 3, "watchdog", True),
    Fault(N.freeze, "C hangs with the interpreter's lock", "stacks, ended in limit + 5 s; " + RESUMES, 2, "watchdog"),
    Fault(N.stuck_data, "a read of data never returns",
          "phase named, exit 6 in limit + 5 s; " + RESUMES, 2, "watchdog"),
    Fault(N.hang_of_one, "one of 2 processes hangs", "both end; " + RESUMES, 1),
    Fault(N.lost_data, "a read of data fails", "exit 3; " + RESUMES, 2),
    Fault(N.broken_loader, "a bug in the loader of one of 2 processes", "both end, not with 0; " + RESUMES, 1, "leave"),
    Fault(N.other_devices, "continued on 4 devices, 1, and 2 processes",
          "losses within 2e-3 of the undisturbed run", 1),
    Fault(N.other_config, "2 processes with different configs", "both exit 8 and name the field", 1),
    Fault(N.missing_process, "one of 2 processes never starts", "the other ends within its limit", 1),
    Fault(N.port_taken, "the coordinator's port is taken", "exit 8, the port named", 1),
    Fault(N.shard_damaged, "one bit of the prepared data flipped", "told, and made anew; " + RESUMES, 2),
    Fault(N.given_shard_damaged, "one bit of given shards flipped", "exit 3, file and fix named", 1),
    Fault(N.secrets, "secrets in the environment, and a crash", "they are in no file and no line", 1),
)
