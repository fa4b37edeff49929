package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// operation is what runs while something is killed.
type operation struct {
	kind string // by which its usual duration is known
	name string
	// run does it. After it was interrupted it is called again, and must then
	// succeed.
	run func(context.Context) error
	// starts operations leave a container running.
	starts bool
	// mustPause operations run inside a container and see no error at all of a
	// killed part of Thaw.
	mustPause bool
	// done is called after it has succeeded.
	done func(*testing.T)
}

func (o *operation) String() string { return strings.TrimSpace(o.kind + " " + o.name) }

// trim gives back what the file systems of the residents' writable disks do not use,
// so that what is written next is allocated anew.
func (c *crash) trim() error {
	var paths []string
	for _, r := range c.residents {
		if r.variant == (variant{"overlaybd", "ext4"}) {
			paths = append(paths, r.container.Rootfs())
		}
	}
	for _, line := range c.baseline {
		if path, ok := strings.CutPrefix(line, "mount "); ok && strings.HasSuffix(path, "/rw") {
			paths = append(paths, path)
		}
	}
	if len(paths) != 2 {
		return fmt.Errorf("writable disks: %q", paths)
	}
	for _, path := range paths {
		dir, err := os.Open(path)
		if err != nil {
			return err
		}
		r := struct{ start, length, minimum uint64 }{length: math.MaxUint64}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), fitrim, uintptr(unsafe.Pointer(&r)))
		dir.Close()
		if errno != 0 {
			return fmt.Errorf("trim %s: %w", path, errno)
		}
	}
	return nil
}

// fitrim is FITRIM of linux/fs.h.
const fitrim = 0xc0185879

// maxItems bounds the images at a time.
const maxItems = 6

// operation chooses what to do next, among what is possible now.
func (c *crash) operation(t *testing.T, v victim) *operation {
	t.Helper()
	byState := map[itemState][]*item{}
	for _, it := range c.items {
		byState[it.state] = append(byState[it.state], it)
	}
	pick := func(s itemState) *item { return byState[s][c.rnd.IntN(len(byState[s]))] }
	newItem := func(ordinary bool) *item {
		it := c.newItem(t, variants[c.rnd.IntN(len(variants))], ordinary)
		c.items = append(c.items, it)
		return it
	}
	var possible []func() *operation
	add := func(weight int, f func() *operation) {
		for range weight {
			possible = append(possible, f)
		}
	}
	if len(c.items) < maxItems || v.converts {
		add(4, func() *operation { return c.convertItem(newItem(false)) })
	}
	if !v.converts {
		if len(c.items) < maxItems {
			add(1, func() *operation { return c.startItem(newItem(true)) })
		}
		if len(byState[converted]) > 0 {
			add(4, func() *operation { return c.startItem(pick(converted)) })
			add(2, func() *operation { return c.forgetItem(pick(converted)) })
		}
		if len(byState[running]) > 0 {
			add(4, func() *operation { return c.removeItem(pick(running)) })
		}
		if !v.mounts || len(possible) == 0 {
			add(1, func() *operation {
				return &operation{kind: "trim", mustPause: true, run: func(context.Context) error { return c.trim() }}
			})
			add(2, func() *operation {
				r := c.residents[c.rnd.IntN(len(c.residents))]
				return &operation{kind: "reading in", name: r.variant.String(), mustPause: true, run: func(ctx context.Context) error {
					sum, err := r.readMuch(ctx)
					if err == nil && sum != r.sum {
						err = fmt.Errorf("read %s, before it was %s", sum, r.sum)
					}
					return err
				}}
			})
		}
	}
	return possible[c.rnd.IntN(len(possible))]()
}

// typicalOf is how long an operation usually takes.
func (c *crash) typicalOf(o *operation) time.Duration {
	if d, ok := c.typical[o.kind]; ok {
		return d
	}
	return time.Second
}

func (c *crash) learn(o *operation, took time.Duration) {
	c.typical[o.kind] = (c.typicalOf(o) + took) / 2
}

func (c *crash) convertItem(it *item) *operation {
	return &operation{
		kind: "convert", name: it.label(),
		run: func(ctx context.Context) error { return c.convert(ctx, it) },
		done: func(t *testing.T) {
			t.Helper()
			it.state = converted
			// Complete means that another conversion has nothing to write.
			if c.rnd.IntN(3) > 0 {
				return
			}
			again, err := c.s.Convert(t.Context(), it.source, it.dest, it.variant.mode, it.variant.filesystem)
			if err != nil {
				c.fatal(t, "convert %s once more: %v", it.name, err)
			}
			if n := again.WrittenBytes(); n != 0 {
				c.fatal(t, "convert %s once more: wrote %d bytes", it.name, n)
			}
		},
	}
}

// label is the item's name in a round's line.
func (it *item) label() string {
	name, _, _ := strings.Cut(it.name, "-")
	return name + " " + it.variant.String()
}

// convert runs thaw image convert, whose process is the converter that can be killed.
func (c *crash) convert(ctx context.Context, it *item) error {
	command := c.s.Command(ctx, "image", "convert", it.source, it.dest,
		"--mode", it.variant.mode, "--filesystem", it.variant.filesystem, "--plain-http", "--quiet")
	command.Env = append(command.Env, "TMPDIR="+c.temporary)
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	if err := command.Start(); err != nil {
		return err
	}
	c.converting.Store(command.Process)
	defer c.converting.Store(nil)
	if err := command.Wait(); err != nil {
		return fmt.Errorf("thaw image convert: %w: %s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

func (c *crash) startItem(it *item) *operation {
	kind := "start"
	if it.ordinary {
		kind = "unpack"
	}
	return &operation{
		kind: kind, name: it.label(), starts: true,
		run: func(ctx context.Context) error {
			if err := c.n.Remove(ctx, it.name); err != nil {
				return err
			}
			var err error
			it.container, _, err = c.n.Cold(ctx, it.name, it.dest)
			return err
		},
		done: func(*testing.T) { it.state = running },
	}
}

func (c *crash) removeItem(it *item) *operation {
	return &operation{
		kind: "remove", name: it.label(),
		run:  func(ctx context.Context) error { return c.remove(ctx, it) },
		done: func(*testing.T) { c.removed(it) },
	}
}

// remove removes an item's container, and its image from containerd.
func (c *crash) remove(ctx context.Context, it *item) error {
	if err := c.n.Remove(ctx, it.name); err != nil {
		return err
	}
	return c.n.RemoveImage(ctx, it.dest)
}

func (c *crash) removed(it *item) {
	it.state = converted
	if it.ordinary {
		c.dropItem(it)
	}
}

func (c *crash) dropItem(gone *item) {
	var left []*item
	for _, it := range c.items {
		if it != gone {
			left = append(left, it)
		}
	}
	c.items = left
}

func (c *crash) forgetItem(it *item) *operation {
	return &operation{
		kind: "forget", name: it.label(),
		run:  func(ctx context.Context) error { return c.forget(ctx, it.dest) },
		done: func(*testing.T) { c.dropItem(it) },
	}
}

// forget removes a converted image from the store. While a node has it attached that
// is refused: for a moment after containerd removed its snapshots, or until containerd
// finds those that it could not remove while the snapshotter was dead.
func (c *crash) forget(ctx context.Context, dest string) error {
	const notFound, inUse = 3, 4 // exit statuses
	for deadline := time.Now().Add(patience); ; {
		_, err := c.s.Do(ctx, "image", "remove", dest)
		var exit *exec.ExitError
		if err == nil || !errors.As(err, &exit) || exit.ExitCode() != inUse || time.Now().After(deadline) {
			if exit != nil && exit.ExitCode() == notFound {
				return nil
			}
			return err
		}
		time.Sleep(200 * time.Millisecond)
		_ = c.n.Tidy(ctx) // fails while containerd is dead, too
	}
}

// checkItems asks every item's container for all its files, and compares.
func (c *crash) checkItems(t *testing.T) {
	t.Helper()
	for _, it := range c.items {
		if it.state != running {
			continue
		}
		body, err := it.container.Get(t.Context(), "/")
		if err != nil || !strings.Contains(body, "hello from "+it.name) {
			c.fatal(t, "%s answers %q, %v", it.name, body, err)
		}
		for path, want := range it.sums {
			body, err := it.container.Get(t.Context(), "/read?path="+url.QueryEscape(path))
			if err != nil {
				c.fatal(t, "%s: %v", it.name, err)
			}
			if got := sum([]byte(body)); got != want {
				c.fatal(t, "%s: %s has sum %s, want %s", it.name, path, got, want)
			}
		}
	}
}
