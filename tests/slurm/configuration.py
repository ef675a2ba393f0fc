"""The test cluster's configuration files, and the nodes and GPUs that they declare."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
from pathlib import Path

from tests.slurm.processes import free_ports

NODES = ("n1", "n2", "n3", "n4")
# Two GPUs a node, of type `fake`. SLURM wants devices and takes the last digit of the name for the GPU's index.
GPUS = {"gpu0": "/dev/null", "gpu1": "/dev/zero"}

SLURM_CONF = """\
ClusterName=kbit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire seconds (120 by default) before it may start again.
AuthInfo=socket={dir}/munge/socket,cred_expire=6
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/state/slurmctld.pid
SlurmdPidFile={dir}/spool/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
SlurmctldSyslogDebug=quiet
SlurmdSyslogDebug=quiet
MailProg=/bin/true
MpiDefault=none
# No cgroups: neither a container nor a user who isn't root need have them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# Real sites allow 1001; a small one lets the tests see how arrays are cut.
MaxArraySize=101
MinJobAge=60
# Between SIGTERM and SIGKILL.
KillWait=10
OverTimeLimit=0
InactiveLimit=0
# A lost node is noticed after about SlurmdTimeout + 2 MessageTimeout seconds.
MessageTimeout=6
BatchStartTimeout=30
UnkillableStepTimeout=60
SlurmctldTimeout=30
SlurmdTimeout=8
ReturnToService=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
# slurmdbd's clients take the munge socket from here.
AccountingStoragePass={dir}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
GresTypes=gpu
{nodes}
PartitionName=main Default=YES Nodes={all_nodes} PriorityTier=1 PreemptMode=REQUEUE MaxTime=1-00:00:00 DefaultTime=10
PartitionName=urgent Nodes={all_nodes} PriorityTier=10 PreemptMode=OFF MaxTime=1-00:00:00 DefaultTime=10
PartitionName=small Nodes={last_node} PriorityTier=1 PreemptMode=REQUEUE MaxTime=00:10:00 DefaultTime=5
"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
CommunicationParameters=NoInAddrAny
# The client library takes the socket from MYSQL_UNIX_PORT.
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageLoc=slurm
# MariaDB's own first user; only this cluster's owner reaches the socket.
StorageUser=root
PidFile={dir}/state/slurmdbd.pid
LogFile={dir}/log/slurmdbd.log
"""


def user_name() -> str:
    """The caller's name; not the login name, which another user's process may have inherited."""
    return pwd.getpwuid(os.geteuid()).pw_name


def write_files(directory: Path) -> None:
    """Write a fresh configuration, munge key and fake GPUs under `directory`, with ports that are free now."""
    for name in ("pids", "etc", "munge", "db", "state", "log", "gpu", *(f"spool/{node}" for node in NODES)):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "db").chmod(0o700)
    write_secret(directory / "munge" / "key", secrets.token_bytes(128))
    for gpu, device in GPUS.items():
        (directory / "gpu" / gpu).symlink_to(device)
    host = socket.gethostname().partition(".")[0]
    ctld_port, dbd_port, *ports = free_ports(2 + len(NODES))
    values = {
        "dir": directory,
        "host": host,
        "user": user_name(),
        "ctld_port": ctld_port,
        "dbd_port": dbd_port,
        "all_nodes": ",".join(NODES),
        "last_node": NODES[-1],
        "nodes": "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs=4 RealMemory=8000 Gres=gpu:fake:{len(GPUS)} State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        ),
    }
    etc = directory / "etc"
    (etc / "gres.conf").write_text("".join(f"Name=gpu Type=fake File={directory / 'gpu' / gpu}\n" for gpu in GPUS))
    write_secret(etc / "slurmdbd.conf", SLURMDBD_CONF.format_map(values).encode())
    (etc / "slurm.conf").write_text(SLURM_CONF.format_map(values))


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, as munge and slurmdbd demand."""
    path.touch(mode=0o600)
    path.write_bytes(content)
