package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// noCache makes a node read everything from the store whenever the kernel has
// forgotten it.
const noCache = "[cache]\nenabled = false\n"

// readAll reads a good part of the image, some 100 MB, and prints a checksum.
const readAll = "find /usr/lib/x86_64-linux-gnu /usr/lib/python3* /usr/lib/aarch64-linux-gnu -xdev -type f -size -8000k -print0 2>/dev/null | sort -z | xargs -0 cat | md5sum"

// reading starts to read in a container and returns a function that waits for the end
// and the checksum.
func reading(t *testing.T, c *launch.Container) func() string {
	t.Helper()
	if err := lab.DropCaches(); err != nil {
		t.Fatal(err)
	}
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := c.Exec(context.Background(), "/bin/sh", "-c", "set -e; "+readAll)
		done <- result{out, err}
	}()
	return func() string {
		r := <-done
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.out
	}
}

// testRemoteFaults reads an image over a network, with store, node and network failing
// meanwhile: that costs time and no error.
func testRemoteFaults(t *testing.T, c *cluster) {
	dest := c.convert(t, recipe.Web(), variants[0])
	m := c.joinAt(t, c.star, "faulty", "1gbit", noCache)
	container, _ := coldStart(t, m.Node, "faults", dest)
	before := m.received(t)
	want := reading(t, container)()
	t.Logf("undisturbed: %s, %.1f MB over the link", strings.TrimSpace(want), float64(m.received(t)-before)/1e6)
	check := func(t *testing.T, got string) {
		t.Helper()
		if got != want {
			t.Errorf("read %q, undisturbed %q", got, want)
		}
	}
	// disturb waits until the reader is well under way.
	disturb := func(t *testing.T, f func()) string {
		t.Helper()
		before := m.received(t)
		wait := reading(t, container)
		for m.received(t)-before < 10e6 {
			time.Sleep(5 * time.Millisecond)
		}
		begin := time.Now()
		f()
		got := wait()
		t.Logf("the reader ended %v after the fault began", time.Since(begin))
		return got
	}

	t.Run("store killed", func(t *testing.T) {
		check(t, disturb(t, func() {
			for range 2 {
				if err := c.store.KillAndRestart(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}))
	})
	t.Run("node killed", func(t *testing.T) {
		check(t, disturb(t, func() {
			if err := m.thaw.KillAndRestart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}))
	})
	t.Run("node stopped while the store is away", func(t *testing.T) {
		check(t, disturb(t, func() {
			c.store.Kill()
			if err := m.thaw.Stop(); err != nil { // does not wait for the store
				t.Error(err)
			}
			if err := m.thaw.Start(t.Context()); err != nil { // nor does this
				t.Fatal(err)
			}
			if err := c.store.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		}))
	})
	t.Run("link down for 10 s", func(t *testing.T) {
		started := make(chan error, 1)
		check(t, disturb(t, func() {
			if err := m.port.SetUp(false); err != nil {
				t.Fatal(err)
			}
			go func() { // a start meanwhile waits, too
				during, timing, err := m.Cold(context.Background(), "during", dest)
				if during != nil {
					err = errors.Join(err, during.Delete(context.Background()))
				}
				t.Logf("a container that was started meanwhile was ready after %v", timing.Total())
				started <- err
			}()
			time.Sleep(10 * time.Second)
			if err := m.port.SetUp(true); err != nil {
				t.Fatal(err)
			}
		}))
		if err := <-started; err != nil {
			t.Error(err)
		}
	})
	t.Run("writable disk, store and node killed", func(t *testing.T) {
		ref := c.convert(t, recipe.Small("a"), variants[2])
		t.Cleanup(func() { // after the container
			if err := m.RemoveImage(context.Background(), ref); err != nil {
				t.Error(err)
			}
		})
		disk, _ := coldStart(t, m.Node, "disk", ref)
		done := make(chan error, 1)
		go func() {
			// Copies what is read from the store, over a disk that is over the store.
			_, err := disk.Exec(context.Background(), "/bin/sh", "-c", `set -e
				for i in 1 2 3; do cp -a /usr/lib /copy$i; sync; done
				for i in 1 2 3; do diff -r --no-dereference /usr/lib /copy$i; done`)
			done <- err
		}()
		for range 2 {
			time.Sleep(300 * time.Millisecond) // some way on; wherever that is, it must do no harm
			if err := c.store.KillAndRestart(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(300 * time.Millisecond)
			if err := m.thaw.KillAndRestart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("store gone", func(t *testing.T) {
		// An image whose blocks are not attached yet is unpacked the ordinary way.
		ref := c.convert(t, recipe.Small("a"), variants[0])
		other := c.join(t, "late", "")
		c.store.Kill()
		t.Cleanup(func() {
			if err := c.store.Start(context.Background()); err != nil {
				t.Error(err)
			}
		})
		gone, timing := coldStart(t, other.Node, "gone", ref)
		if body, err := gone.Ready(t.Context()); err != nil || !strings.Contains(body, "hello from a") {
			t.Errorf("%q, %v", body, err)
		}
		t.Logf("without its store: pull %v", timing.Pull)
	})
	t.Run("image in use", func(t *testing.T) {
		out, err := c.store.Do(t.Context(), "image", "remove", dest)
		if err == nil || !strings.Contains(err.Error(), "faulty") {
			t.Errorf("an image was removed that a node has attached: %s, %v", out, err)
		}
		if out, err := c.store.Do(t.Context(), "attachment", "list", "--node", "faulty"); err != nil || !strings.Contains(string(out), "soldier-") {
			t.Errorf("attachments: %s, %v", out, err)
		}
		if out, err := m.thaw.Do(t.Context(), "image", "list"); err == nil || !strings.Contains(err.Error(), "no store") {
			t.Errorf("images of a node: %s, %v", out, err)
		}
		// When nobody uses it any more it can go.
		if err := errors.Join(container.Delete(t.Context()), m.RemoveImage(t.Context(), dest), m.thaw.WaitNoSnapshots(t.Context())); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			out, err := c.store.Do(t.Context(), "attachment", "list", "--node", "faulty", "--json")
			if err == nil && !strings.Contains(string(out), "soldier-") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the node lets go of nothing: %s, %v", out, err)
			}
		}
		// Nor what nodes have that are gone for good: those of other tests.
		out, err = c.store.Do(t.Context(), "attachment", "list", "--json")
		if err != nil {
			t.Fatal(err)
		}
		var left []struct{ Node string }
		if err := json.Unmarshal(out, &left); err != nil {
			t.Fatal(err)
		}
		for _, a := range left {
			if out, err := c.store.Do(t.Context(), "attachment", "delete", "--node", a.Node, "--all"); err != nil {
				t.Errorf("%s, %v", out, err)
			}
		}
		if out, err := c.store.Do(t.Context(), "image", "remove", dest); err != nil {
			t.Errorf("remove an image that nobody uses: %s, %v", out, err)
		}
	})
}

// lossyProxy forwards from a port of one star to the same port of another and breaks one
// in a hundred of the connections, or of the pieces that they carry, off.
type lossyProxy struct {
	ctx     context.Context
	end     context.CancelFunc
	wg      sync.WaitGroup
	broken  atomic.Int64
	carried atomic.Int64
}

func newLossyProxy(t *testing.T, front, back *lab.Star, ports ...string) *lossyProxy {
	t.Helper()
	p := &lossyProxy{}
	p.ctx, p.end = context.WithCancel(context.Background())
	for _, port := range ports {
		l, err := front.Listen(port)
		if err != nil {
			t.Fatal(err)
		}
		context.AfterFunc(p.ctx, func() { l.Close() })
		p.wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				p.wg.Go(func() { p.carry(c, back, port) })
			}
		})
	}
	t.Cleanup(func() { p.end(); p.wg.Wait() })
	return p
}

// pieceBytes is what is carried between two throws of the dice: some ten milliseconds of a
// link of 1 Gbit/s, so that a connection dies several times in a test.
const pieceBytes = 1 << 20

func (p *lossyProxy) carry(c net.Conn, back *lab.Star, port string) {
	defer c.Close()
	if rand.N(100) == 0 {
		p.broken.Add(1)
		return
	}
	d, err := back.Dial(p.ctx, net.JoinHostPort(back.Host, port))
	if err != nil {
		return
	}
	defer d.Close()
	stop := context.AfterFunc(p.ctx, func() { c.Close(); d.Close() })
	defer stop()
	done := make(chan struct{}, 2)
	pump := func(to, from net.Conn) {
		defer func() { done <- struct{}{} }()
		for {
			n, err := io.CopyN(to, from, pieceBytes)
			p.carried.Add(n)
			if err != nil {
				return
			}
			if rand.N(100) == 0 {
				p.broken.Add(1)
				return
			}
		}
	}
	go pump(d, c)
	go pump(c, d)
	<-done
	c.Close()
	d.Close()
	<-done
}

// testRemoteLossy reads over a network that breaks one in a hundred connections off.
func testRemoteLossy(t *testing.T, c *cluster) {
	b := c.b
	dest := c.convert(t, recipe.Web(), variants[0])
	front, err := b.lab.NewStar()
	if err != nil {
		t.Fatal(err)
	}
	proxy := newLossyProxy(t, front, c.star, attacherPort, nvmePort)
	m := c.joinAt(t, front, "lossy", "", noCache)
	container, timing := coldStart(t, m.Node, "lossy", dest)
	want := ""
	for range 3 {
		got := reading(t, container)()
		if want == "" {
			want = got
		}
		if got != want {
			t.Errorf("read %q, before %q", got, want)
		}
	}
	t.Logf("ready %v; %d connections were broken, %.1f MB carried", timing.Total(), proxy.broken.Load(), float64(proxy.carried.Load())/1e6)
	if proxy.broken.Load() == 0 {
		t.Error("no connection was broken: the test shows nothing")
	}
}

// testRemoteTen starts one image on ten nodes at once.
func testRemoteTen(t *testing.T, c *cluster) {
	b := c.b
	dest := c.convert(t, recipe.Web(), variants[0])
	const nodes = 10
	members := make([]*member, nodes)
	for i := range members {
		members[i] = c.join(t, fmt.Sprintf("ten-%d", i), "1gbit")
	}
	if err := lab.DropCaches(); err != nil {
		t.Fatal(err)
	}
	type outcome struct {
		container *launch.Container
		timing    launch.Timing
		err       error
	}
	outcomes := make([]outcome, nodes)
	var wg sync.WaitGroup
	begin := time.Now()
	for i, m := range members {
		wg.Go(func() {
			o := &outcomes[i]
			o.container, o.timing, o.err = m.Cold(t.Context(), fmt.Sprintf("ten-%d", i), dest)
		})
	}
	wg.Wait()
	took := time.Since(begin)
	var slowest launch.Timing
	var errs []error
	for _, o := range outcomes {
		errs = append(errs, o.err)
		if o.timing.Total() > slowest.Total() {
			slowest = o.timing
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	for i, o := range outcomes {
		if o.container != nil {
			if err := o.container.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		}
		wantNoLayers(t, b, members[i].Containerd.Root, "64k")
	}
	t.Logf("ten nodes were ready after %v, the slowest: pull %v, create %v, ready %v", took, slowest.Pull, slowest.Create, slowest.Ready)
}
