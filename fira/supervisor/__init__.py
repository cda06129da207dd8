"""Start the ranks of a training run, and start them again after a failure or when their number changes.

supervise.py         the loop: start a job, observe it, decide what follows
decision.py          what follows the end of a job, as a function without side effects
elastic_layouts.py   the numbers of ranks that can run, and the settings that all of them have in common
hosts.py             the hosts that exist now, and the ranks on each
job.py               one job: a launcher and its ranks
exit_cause.py        which rank ended a job, and how
"""
