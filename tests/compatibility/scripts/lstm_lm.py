"""PyTorch's word language model: an LSTM with truncated backpropagation, hidden state carried over, lr annealed."""

import math
import time

import torch
from torch import nn


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers)
        self.decoder = nn.Linear(nhid, ntoken)
        self.nhid, self.nlayers, self.ntoken = nhid, nlayers, ntoken
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input, hidden):
        emb = self.encoder(input)
        output, hidden = self.rnn(emb, hidden)
        decoded = self.decoder(output).view(-1, self.ntoken)
        return nn.functional.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return (weight.new_zeros(self.nlayers, bsz, self.nhid), weight.new_zeros(self.nlayers, bsz, self.nhid))


def repackage_hidden(h):
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    return data.narrow(0, 0, nbatch * bsz).view(bsz, -1).t().contiguous().to(device)


torch.manual_seed(1111)
device = torch.device("cuda")
with open(torch.nn.__file__) as f:
    text = f.read()
vocab = {c: i for i, c in enumerate(sorted(set(text)))}
corpus = torch.tensor([vocab[c] for c in text[:1500]])
train_data, val_data = batchify(corpus[:1200], 8), batchify(corpus[1200:], 8)
bptt = 12


def get_batch(source, i):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].view(-1)


model = RNNModel(len(vocab), 16, 24, 2).to(device)
criterion = nn.NLLLoss()


def evaluate(source):
    model.eval()
    total_loss, hidden = 0.0, model.init_hidden(8)
    with torch.no_grad():
        for i in range(0, source.size(0) - 1, bptt):
            data, targets = get_batch(source, i)
            output, hidden = model(data, hidden)
            hidden = repackage_hidden(hidden)
            total_loss += len(data) * criterion(output, targets).item()
    return total_loss / (len(source) - 1)


lr, best = 2.0, None
for epoch in range(2):
    model.train()
    total_loss, start = 0.0, time.time()
    hidden = model.init_hidden(8)
    for batch, i in enumerate(range(0, train_data.size(0) - 1, bptt)):
        data, targets = get_batch(train_data, i)
        model.zero_grad()
        hidden = repackage_hidden(hidden)
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)
        total_loss += loss.item()
        if batch % 4 == 3:
            print(f"| epoch {epoch} | batch {batch} | loss {total_loss / 4:.6f} | ppl {math.exp(total_loss / 4):.4f}")
            total_loss = 0
    val_loss = evaluate(val_data)
    print(f"| end of epoch {epoch} | valid loss {val_loss:.6f}")
    if not best or val_loss < best:
        torch.save(model, "lstm.pt")
        best = val_loss
    else:
        lr /= 4.0
model = torch.load("lstm.pt", weights_only=False)
model.rnn.flatten_parameters()
print(f"test loss {evaluate(val_data):.6f}")
