package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/client"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
)

// warmNode is one containerd with both snapshotters, on which every image is pulled.
type warmNode struct {
	containerd *lab.Containerd
	images     map[string]client.Image // by subject
}

func (b *bench) warmStart() comparison {
	c := comparison{
		name:   "warm",
		about:  "start of an image that is on the node: create container and mounts, start, first HTTP answer",
		rounds: 15, warmUp: true,
		metrics: []metric{{"", "s", true, 1.1}, {"create", "s", true, 0}, {"ready", "s", true, 0}},
		subjects: []subject{{"overlayfs", func(ctx context.Context) (sample, error) {
			return b.startWarm(ctx, "overlayfs", "overlayfs")
		}}},
	}
	for _, v := range variants {
		c.subjects = append(c.subjects, subject{v.String(), func(ctx context.Context) (sample, error) {
			return b.startWarm(ctx, "thaw", v.String())
		}})
	}
	return c
}

// converted starts a thaw server and converts the image in every variant.
func (b *bench) converted(ctx context.Context) (t *lab.Thaw, source string, err error) {
	if source, err = b.image(ctx); err != nil {
		return nil, "", err
	}
	if t, err = b.lab.StartThaw(ctx); err != nil {
		return nil, "", err
	}
	for _, v := range variants {
		progress("converting to %s", v)
		if _, err := t.Convert(ctx, source, source+"-"+v.String(), v.mode, v.filesystem); err != nil {
			return nil, "", err
		}
	}
	return t, source, nil
}

func (b *bench) warmNode(ctx context.Context) (*warmNode, error) {
	return b.warm.get(func() (*warmNode, error) {
		t, source, err := b.converted(ctx)
		if err != nil {
			return nil, err
		}
		w := &warmNode{images: map[string]client.Image{}}
		if w.containerd, err = b.lab.StartContainerd(ctx, lab.ContainerdOptions{Thaw: t}); err != nil {
			return nil, err
		}
		if w.images["overlayfs"], err = b.node(w.containerd, "overlayfs").Pull(ctx, source); err != nil {
			return nil, err
		}
		for _, v := range variants {
			if w.images[v.String()], err = b.node(w.containerd, "thaw").Pull(ctx, source+"-"+v.String()); err != nil {
				return nil, err
			}
		}
		settle()
		return w, nil
	})
}

func (b *bench) node(c *lab.Containerd, snapshotter string) *launch.Node {
	return &launch.Node{Lab: b.lab, Containerd: c, Snapshotter: snapshotter}
}

func (b *bench) startWarm(ctx context.Context, snapshotter, image string) (_ sample, err error) {
	w, err := b.warmNode(ctx)
	if err != nil {
		return nil, err
	}
	container, timing, err := b.node(w.containerd, snapshotter).Warm(ctx, b.next("warm"), w.images[image])
	if container != nil {
		defer func() { err = errors.Join(err, container.Delete(context.WithoutCancel(ctx))) }()
	}
	if err != nil {
		return nil, err
	}
	return sample{"": timing.Total().Seconds(), "create": timing.Create.Seconds(), "ready": timing.Ready.Seconds()}, nil
}

// coldStore is a server that holds every variant of the image.
type coldStore struct {
	thaw   *lab.Thaw
	source string
}

func (b *bench) coldStart() comparison {
	c := comparison{
		name:    "cold",
		about:   "start of an image that is not on the node, page cache empty, registry on the loopback (the store is on the same machine)",
		rounds:  3,
		metrics: []metric{{"", "s", true, 0}, {"pull", "s", true, 0}, {"create", "s", true, 0}, {"ready", "s", true, 0}},
		subjects: []subject{{"overlayfs", func(ctx context.Context) (sample, error) {
			return b.startCold(ctx, "overlayfs", "")
		}}},
	}
	for _, v := range variants {
		c.subjects = append(c.subjects, subject{v.String(), func(ctx context.Context) (sample, error) {
			return b.startCold(ctx, "thaw", "-"+v.String())
		}})
	}
	return c
}

func (b *bench) startCold(ctx context.Context, snapshotter, suffix string) (_ sample, err error) {
	store, err := b.cold.get(func() (*coldStore, error) {
		t, source, err := b.converted(ctx)
		return &coldStore{t, source}, err
	})
	if err != nil {
		return nil, err
	}
	o := lab.ContainerdOptions{}
	if snapshotter == "thaw" {
		o.Thaw = store.thaw
	}
	c, err := b.lab.StartContainerd(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Stop(), os.RemoveAll(filepath.Dir(c.Root))) }()
	node, ref := b.node(c, snapshotter), store.source+suffix
	if err := lab.DropCaches(); err != nil {
		return nil, err
	}
	container, timing, err := node.Cold(ctx, b.next("cold"), ref)
	defer func() {
		ctx := context.WithoutCancel(ctx)
		if container != nil {
			err = errors.Join(err, container.Delete(ctx))
		}
		err = errors.Join(err, node.RemoveImage(ctx, ref))
		if snapshotter == "thaw" {
			err = errors.Join(err, store.thaw.WaitNoSnapshots(ctx))
		}
	}()
	if err != nil {
		return nil, err
	}
	return sample{"": timing.Total().Seconds(), "pull": timing.Pull.Seconds(), "create": timing.Create.Seconds(), "ready": timing.Ready.Seconds()}, nil
}
