"""Image segmentation with a small U-Net: Dice and BCE, IoU, ReduceLROnPlateau, autocast and GradScaler as in Pytorch-UNet."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class DoubleConv(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 8), DoubleConv(8, 16), DoubleConv(16, 16)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv1 = DoubleConv(32, 8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.conv2 = DoubleConv(16, 8)
        self.outc = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        y = self.up1(x3)
        dy, dx = x2.size(2) - y.size(2), x2.size(3) - y.size(3)
        y = F.pad(y, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        y = self.conv1(torch.cat([x2, y], dim=1))
        y = self.conv2(torch.cat([x1, self.up2(y)], dim=1))
        return self.outc(y)


def dice_loss(pred, target, smooth=1.0):
    pred = torch.sigmoid(pred)
    inter = (pred * target).sum(dim=(2, 3))
    return (1 - (2 * inter + smooth) / (pred.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + smooth)).mean()


torch.manual_seed(0)
device = torch.device("cuda")
amp = False
model = UNet().to(device=device, memory_format=torch.channels_last)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, weight_decay=1e-8, momentum=0.9, foreach=True)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=1)
grad_scaler = torch.cuda.amp.GradScaler(enabled=amp)
criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0], device=device))
images = torch.randn(20, 3, 20, 20)
masks = (images.mean(1, keepdim=True) > 0).float()
for epoch in range(4):
    model.train()
    for i in range(0, 16, 8):
        x = images[i : i + 8].to(device=device, dtype=torch.float32, memory_format=torch.channels_last)
        y = masks[i : i + 8].to(device=device)
        with torch.autocast(device.type if device.type != "mps" else "cpu", enabled=amp):
            pred = model(x)
            loss = criterion(pred, y) + dice_loss(pred, y)
        optimizer.zero_grad(set_to_none=True)
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        print(f"epoch {epoch} loss {loss.item():.6f}")
    model.eval()
    with torch.no_grad():
        pred = model(images[16:].to(device)) > 0
        truth = masks[16:].to(device) > 0.5
        iou = (pred & truth).sum().float() / (pred | truth).sum().float()
    scheduler.step(iou)
    print(f"iou {iou.item():.6f} lr {optimizer.param_groups[0]['lr']:.8f}")
