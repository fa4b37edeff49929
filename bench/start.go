package main

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/client"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
)

// warmNode is a containerd on which one image is pulled.
type warmNode struct {
	node  *launch.Node
	image client.Image
}

func (b *bench) warmStart() comparison {
	c := comparison{
		name:   "warm",
		about:  "start of an image that is on the node: create container and mounts, start, first HTTP answer",
		rounds: 15, warmUp: true,
		metrics: []metric{{"", "s", true, 1.1}, {"create", "s", true, 0}, {"ready", "s", true, 0}},
	}
	// Of the same layers a snapshotter has one form at a time, whichever image it was
	// pulled with first, so each variant has a node of its own, and so has the floor.
	add := func(name string, pull func(context.Context) (*warmNode, error)) {
		var node fixture[*warmNode]
		c.subjects = append(c.subjects, subject{name, func(ctx context.Context) (sample, error) {
			n, err := node.get(func() (*warmNode, error) { return pull(ctx) })
			if err != nil {
				return nil, err
			}
			return b.startWarm(ctx, n)
		}})
	}
	add("overlayfs", func(ctx context.Context) (*warmNode, error) {
		ref, err := b.image(ctx)
		if err != nil {
			return nil, err
		}
		return b.pulled(ctx, nil, ref)
	})
	for _, v := range variants {
		add(v.String(), func(ctx context.Context) (*warmNode, error) {
			t, refs, err := b.converted(ctx, b.image, v)
			if err != nil {
				return nil, err
			}
			return b.pulled(ctx, t, refs[0])
		})
	}
	return c
}

// converted starts a thaw server and converts an image to the variants.
func (b *bench) converted(ctx context.Context, image func(context.Context) (string, error), variants ...variant) (t *lab.Thaw, refs []string, err error) {
	source, err := image(ctx)
	if err != nil {
		return nil, nil, err
	}
	if t, err = b.lab.StartThaw(ctx); err != nil {
		return nil, nil, err
	}
	for _, v := range variants {
		progress("converting %s to %s", source, v)
		ref := source + "-" + v.String()
		if _, err := t.Convert(ctx, source, ref, v.mode, v.filesystem); err != nil {
			return nil, nil, err
		}
		refs = append(refs, ref)
	}
	return t, refs, nil
}

// pulled starts a containerd and pulls an image with Thaw, or with overlayfs when t
// is nil.
func (b *bench) pulled(ctx context.Context, t *lab.Thaw, ref string) (*warmNode, error) {
	c, err := b.lab.StartContainerd(ctx, lab.ContainerdOptions{Thaw: t})
	if err != nil {
		return nil, err
	}
	w := &warmNode{node: b.node(c, t)}
	if w.image, err = w.node.Pull(ctx, ref); err != nil {
		return nil, err
	}
	return w, settle()
}

// node is a containerd's with Thaw's snapshotter, or with overlayfs when t is nil.
func (b *bench) node(c *lab.Containerd, t *lab.Thaw) *launch.Node {
	n := &launch.Node{Lab: b.lab, Containerd: c, Snapshotter: "overlayfs"}
	if t != nil {
		n.Snapshotter = "thaw"
	}
	return n
}

func (b *bench) startWarm(ctx context.Context, w *warmNode) (_ sample, err error) {
	container, timing, err := w.node.Warm(ctx, b.next("warm"), w.image)
	if container != nil {
		defer func() { err = errors.Join(err, container.Delete(context.WithoutCancel(ctx))) }()
	}
	if err != nil {
		return nil, err
	}
	return sample{"": timing.Total().Seconds(), "create": timing.Create.Seconds(), "ready": timing.Ready.Seconds()}, nil
}

func (b *bench) coldStart() comparison {
	var thaw fixture[*lab.Thaw]
	c := comparison{
		name:   "cold",
		about:  "start of an image that is not on the node, page cache empty, registry on the loopback (the store is on the same machine)",
		rounds: 5, warmUp: true,
		metrics: []metric{{"", "s", true, 0}, {"pull", "s", true, 0}, {"create", "s", true, 0}, {"ready", "s", true, 0}},
		subjects: []subject{{"overlayfs", func(ctx context.Context) (sample, error) {
			ref, err := b.image(ctx)
			if err != nil {
				return nil, err
			}
			return b.startCold(ctx, nil, ref)
		}}},
	}
	for _, v := range variants {
		c.subjects = append(c.subjects, subject{v.String(), func(ctx context.Context) (sample, error) {
			t, err := thaw.get(func() (*lab.Thaw, error) {
				t, _, err := b.converted(ctx, b.image, variants...)
				return t, err
			})
			if err != nil {
				return nil, err
			}
			ref, err := b.image(ctx)
			if err != nil {
				return nil, err
			}
			return b.startCold(ctx, t, ref+"-"+v.String())
		}})
	}
	return c
}

// startCold starts an image on a new node; t is nil for overlayfs.
func (b *bench) startCold(ctx context.Context, t *lab.Thaw, ref string) (_ sample, err error) {
	c, err := b.lab.StartContainerd(ctx, lab.ContainerdOptions{Thaw: t})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	node := b.node(c, t)
	if err := lab.DropCaches(); err != nil {
		return nil, err
	}
	container, timing, err := node.Cold(ctx, b.next("cold"), ref)
	defer func() {
		ctx := context.WithoutCancel(ctx)
		if container != nil {
			err = errors.Join(err, container.Delete(ctx))
		}
		if t != nil {
			err = errors.Join(err, node.RemoveImage(ctx, ref), t.WaitNoSnapshots(ctx))
		} // else see pull
	}()
	if err != nil {
		return nil, err
	}
	return sample{"": timing.Total().Seconds(), "pull": timing.Pull.Seconds(), "create": timing.Create.Seconds(), "ready": timing.Ready.Seconds()}, nil
}
