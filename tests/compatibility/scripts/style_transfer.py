"""Neural style transfer: the image is the parameter, frozen features, Gram matrices, LBFGS, retain_graph"""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

device = torch.device("cuda")
torch.manual_seed(0)


def gram_matrix(input):
    a, b, c, d = input.size()
    features = input.view(a * b, c * d)
    return torch.mm(features, features.t()).div(a * b * c * d)


class ContentLoss(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = target.detach()

    def forward(self, input):
        self.loss = F.mse_loss(input, self.target)
        return input


class StyleLoss(nn.Module):
    def __init__(self, target_feature):
        super().__init__()
        self.target = gram_matrix(target_feature).detach()

    def forward(self, input):
        self.loss = F.mse_loss(gram_matrix(input), self.target)
        return input


cnn = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1)).to(device)
cnn.eval().requires_grad_(False)
content_img, style_img = torch.rand(1, 3, 16, 16).to(device), torch.rand(1, 3, 16, 16).to(device)
model, style_losses, content_losses = nn.Sequential(), [], []
for i, layer in enumerate(cnn.children()):
    if isinstance(layer, nn.ReLU):
        layer = nn.ReLU(inplace=False)
    model.add_module(f"layer_{i}", layer)
    if isinstance(layer, nn.Conv2d):
        content_losses.append(ContentLoss(model(content_img).detach()))
        model.add_module(f"content_{i}", content_losses[-1])
        style_losses.append(StyleLoss(model(style_img).detach()))
        model.add_module(f"style_{i}", style_losses[-1])

input_img = content_img.clone()
input_img.requires_grad_(True)
optimizer = optim.LBFGS([input_img])
run = [0]
while run[0] <= 30:

    def closure():
        with torch.no_grad():
            input_img.clamp_(0, 1)
        optimizer.zero_grad()
        model(input_img)
        style_score = sum(sl.loss for sl in style_losses) * 1000
        content_score = sum(cl.loss for cl in content_losses)
        loss = style_score + content_score
        loss.backward(retain_graph=True)
        run[0] += 1
        if run[0] % 10 == 0:
            print(
                "run {}: Style Loss : {:6f} Content Loss: {:6f}".format(
                    run[0], style_score.item(), content_score.item()
                )
            )
        return style_score + content_score

    optimizer.step(closure)
with torch.no_grad():
    input_img.clamp_(0, 1)
print(f"image {input_img.mean().item():.4f}")
