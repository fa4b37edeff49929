package export_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
)

// cable passes connections on to a store until it is cut.
type cable struct {
	t  *testing.T
	to string
	l  net.Listener

	mu    sync.Mutex
	conns []net.Conn // guarded by mu
	wg    sync.WaitGroup
}

func plug(t *testing.T, to string) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	c := &cable{t: t, to: to, l: l}
	c.wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			c.mu.Lock()
			c.conns = append(c.conns, a, b)
			c.mu.Unlock()
			c.wg.Go(func() { io.Copy(a, b); a.Close() })
			c.wg.Go(func() { io.Copy(b, a); b.Close() })
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.cut()
		c.wg.Wait()
	})
	return c
}

// cut breaks all connections; new ones can be made.
func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

// converter is a connection of a converter on another machine.
type converter struct {
	attacherv1.AttacherClient
	t *testing.T
}

func (s *shop) converter(name, address string) *converter {
	s.Helper()
	conn, err := rpc.DialTLS(address, s.files(s.ca, name))
	must(s, err)
	s.Cleanup(func() { conn.Close() })
	return &converter{attacherv1.NewAttacherClient(conn), s.T}
}

func (c *converter) hold(ctx context.Context, owner string) (grpc.ServerStreamingClient[attacherv1.HoldResponse], error) {
	h, err := c.Hold(ctx, &attacherv1.HoldRequest{Owner: owner}, grpc.WaitForReady(true))
	if err == nil {
		_, err = h.Recv()
	}
	return h, err
}

func (c *converter) create(name, owner string) {
	c.t.Helper()
	_, err := c.CreateLvol(c.t.Context(), &attacherv1.CreateLvolRequest{Name: name, SizeBytes: blockBytes, Owner: owner})
	must(c.t, err)
}

func (s *shop) there(name string) bool {
	s.Helper()
	_, err := s.lvols.Get(name)
	if err != nil && !errors.Is(err, kind.NotFound) {
		s.Fatal(err)
	}
	return err == nil
}

func (s *shop) goes(name string, within time.Duration) {
	s.Helper()
	begin := time.Now()
	for s.there(name) {
		if time.Since(begin) > within {
			s.Fatalf("lvol %s is there after %s", name, within)
		}
		time.Sleep(time.Millisecond)
	}
	s.Logf("%s went after %s", name, time.Since(begin))
}

// TestHoldOverNetwork: a connection that breaks is not its converter's death yet; a stream that
// the converter ends is.
func TestHoldOverNetwork(t *testing.T) {
	const grace = 2 * time.Second
	s := openShopFor(t, grace, "builder", "other")
	wire := plug(t, s.address)
	c := s.converter("builder", wire.l.Addr().String())

	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.hold(ctx, "o")
	must(t, err)
	c.create("ended", "o")
	cancel()
	s.goes("ended", grace-time.Second/2)

	h, err := c.hold(t.Context(), "o")
	must(t, err)
	c.create("work", "o")
	for range 2 { // the grace begins anew with every interruption
		wire.cut()
		if _, err := h.Recv(); kind.Of(err) != kind.Unavailable {
			t.Fatal(err)
		}
		time.Sleep(grace / 2)
		if h, err = c.hold(t.Context(), "o"); err != nil {
			t.Fatal(err)
		}
		c.create("work", "o")
	}
	time.Sleep(grace)
	if !s.there("work") {
		t.Fatal("what a converter that came back holds is gone")
	}
	wire.cut()
	if _, err := h.Recv(); err == nil {
		t.Fatal("the stream outlives its connection")
	}
	time.Sleep(grace / 4)
	if !s.there("work") {
		t.Fatal("what a converter held is gone before the grace has passed")
	}
	s.goes("work", 3*grace)
}

// TestHoldTakenOver: a converter that is back before its store has heard of the interruption
// goes on at once; nobody else can.
func TestHoldTakenOver(t *testing.T) {
	s := openShop(t, "builder", "other")
	first, second := s.converter("builder", s.address), s.converter("builder", s.address)
	old, err := first.hold(t.Context(), "o")
	must(t, err)
	first.create("work", "o")
	if _, err := s.converter("other", s.address).hold(t.Context(), "o"); kind.Of(err) != kind.InUse {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err = second.hold(ctx, "o")
	must(t, err)
	if _, err := old.Recv(); kind.Of(err) != kind.InUse {
		t.Fatal(err)
	}
	second.create("work", "o")
	time.Sleep(500 * time.Millisecond) // more than the old stream's end takes
	if !s.there("work") {
		t.Fatal("the old stream's end took what the new one holds")
	}
	cancel()
	s.goes("work", 5*time.Second)
}
