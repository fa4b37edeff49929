package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/thaw-project/thaw/e2e/lab"
)

// conversion compares thaw image convert, into an empty store, with a pull and unpack
// by a containerd with an empty content store: both fetch every layer from the same
// registry, decompress it, and write its files.
func (b *bench) conversion() comparison {
	c := comparison{
		name:   "convert",
		about:  "thaw image convert next to containerd's pull and unpack (overlayfs), both with nothing on the node",
		rounds: 5, warmUp: true,
		metrics: []metric{{"", "s", true, 1.5}, {name: "cpu", unit: "CPU s"}, {name: "peak-rss", unit: "MiB"}},
		subjects: []subject{
			{"containerd-pull", b.pull},
		},
	}
	for _, v := range variants {
		c.subjects = append(c.subjects, subject{v.String(), func(ctx context.Context) (sample, error) { return b.convert(ctx, v) }})
	}
	return c
}

func (b *bench) pull(ctx context.Context) (_ sample, err error) {
	ref, err := b.image(ctx)
	if err != nil {
		return nil, err
	}
	c, err := b.lab.StartContainerd(ctx, lab.ContainerdOptions{})
	if err != nil {
		return nil, err
	}
	// What it unpacked is left for the lab to remove at the end: ext4 is slow to make
	// files for a minute after many were deleted, which the next pull would pay for.
	defer func() { err = errors.Join(err, c.Stop()) }()
	node := b.node(c, nil)
	if err := settle(); err != nil {
		return nil, err
	}
	before, err := c.CPU()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if _, err := node.Pull(ctx, ref); err != nil {
		return nil, err
	}
	took := time.Since(begin)
	after, err := c.CPU()
	return sample{"": took.Seconds(), "cpu": (after - before).Seconds()}, err
}

func (b *bench) convert(ctx context.Context, v variant) (_ sample, err error) {
	ref, err := b.image(ctx)
	if err != nil {
		return nil, err
	}
	t, err := b.lab.StartThaw(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		err = errors.Join(err, t.Shutdown(ctx), os.RemoveAll(filepath.Dir(t.Root)))
	}()
	if err := settle(); err != nil {
		return nil, err
	}
	before, err := t.CPU()
	if err != nil {
		return nil, err
	}
	converted, err := t.Convert(ctx, ref, ref+"-"+v.String(), v.mode, v.filesystem)
	if err != nil {
		return nil, err
	}
	after, err := t.CPU()
	return sample{
		"":         converted.Took.Seconds(),
		"cpu":      (converted.CPU + after - before).Seconds(),
		"peak-rss": float64(converted.PeakRSSBytes) / (1 << 20),
	}, err
}
