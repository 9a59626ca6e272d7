"""PyTorch's DQN tutorial: replay memory, boolean masks, gather, a target network updated softly, clip_grad_value_."""

import random
from collections import deque, namedtuple

import torch
import torch.nn as nn
import torch.optim as optim

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
random.seed(0)
torch.manual_seed(0)
Transition = namedtuple("Transition", ("state", "action", "next_state", "reward"))
memory = deque(maxlen=100)


def make():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)


policy_net, target_net = make(), make()
target_net.load_state_dict(policy_net.state_dict())
optimizer = optim.AdamW(policy_net.parameters(), lr=1e-3, amsgrad=True)
BATCH, GAMMA, TAU = 8, 0.99, 0.05
state = torch.randn(1, 4, device="cpu").to(device)
for t in range(14):
    if random.random() < 0.5:
        with torch.no_grad():
            action = policy_net(state).max(1).indices.view(1, 1)
    else:
        action = torch.tensor([[random.randrange(3)]], device=device, dtype=torch.long)
    noise = torch.randn(1, 4).to(device)
    next_state = None if t % 5 == 4 else 0.8 * state + 0.1 * (action.item() - 1) + 0.1 * noise
    reward = torch.tensor([random.random()], device=device)
    memory.append(Transition(state, action, next_state, reward))
    state = next_state if next_state is not None else torch.randn(1, 4).to(device)
    if len(memory) < BATCH:
        continue
    batch = Transition(*zip(*random.sample(memory, BATCH), strict=True))
    mask = torch.tensor(tuple(s is not None for s in batch.next_state), device=device, dtype=torch.bool)
    non_final_next_states = torch.cat([s for s in batch.next_state if s is not None])
    state_batch, action_batch, reward_batch = torch.cat(batch.state), torch.cat(batch.action), torch.cat(batch.reward)
    state_action_values = policy_net(state_batch).gather(1, action_batch)
    next_state_values = torch.zeros(BATCH, device=device)
    with torch.no_grad():
        next_state_values[mask] = target_net(non_final_next_states).max(1).values
    expected = (next_state_values * GAMMA) + reward_batch
    loss = nn.SmoothL1Loss()(state_action_values, expected.unsqueeze(1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()
    target = target_net.state_dict()
    policy = policy_net.state_dict()
    for key in policy:
        target[key] = policy[key] * TAU + target[key] * (1 - TAU)
    target_net.load_state_dict(target)
    print(f"{t} loss {loss.item():.6f} q {state_action_values.max().item():.6f}")
