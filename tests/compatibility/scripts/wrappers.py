"""DataParallel, DistributedDataParallel of one process, SyncBatchNorm, DistributedSampler, all_reduce of the loss."""

import os
import socket

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

torch.manual_seed(0)
data = TensorDataset(torch.randn(48, 8), torch.randint(0, 3, (48,)))


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


model = nn.DataParallel(make()).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=12):
    loss = nn.functional.cross_entropy(model(x.cuda()), y.cuda(non_blocking=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"dp {loss.item():.6f}")
torch.save(model.module.state_dict(), "dp.pt")

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("RANK", "0")
os.environ.setdefault("WORLD_SIZE", "1")
os.environ.setdefault("LOCAL_RANK", "0")
local_rank = int(os.environ["LOCAL_RANK"])
if torch.cuda.is_available():
    torch.cuda.set_device(local_rank)
dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", local_rank)
model = make()
if torch.cuda.is_available():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
model = model.to(device)
model = DDP(model, device_ids=[local_rank] if torch.cuda.is_available() else None, find_unused_parameters=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
sampler = DistributedSampler(data, shuffle=True)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for i, (x, y) in enumerate(DataLoader(data, batch_size=12, sampler=sampler, drop_last=True)):
        if i % 2 == 0:
            with model.no_sync():
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device)) / 2
                loss.backward()
        else:
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reduced = loss.detach().clone()
        dist.all_reduce(reduced, op=dist.ReduceOp.SUM)
        reduced /= dist.get_world_size()
        if dist.get_rank() == 0:
            print(f"ddp {reduced.item():.6f}")
dist.barrier()
dist.destroy_process_group()
