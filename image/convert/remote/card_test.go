package remote_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/card"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/image/convert/remote"
	"github.com/thaw-project/thaw/kind"
)

// serveCard serves a card's attacher, whose bridge is away, on a socket in dir. It ends as a
// process does that is told to.
func serveCard(t *testing.T, dir string) (socket string, end func()) {
	t.Helper()
	bridge, err := rpc.Dial(filepath.Join(dir, "bridge.sock"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := card.New(card.Options{Bridge: bridge, DBPath: filepath.Join(dir, "card.db"), Host: "host-1", Functions: []card.Function{{Physical: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "card.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(rpc.ServerOptions()...)
	attacherv1.RegisterCardServer(s, c)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	return socket, func() {
		c.Stop()
		s.Stop()
		<-done
		if err := errors.Join(c.Close(), bridge.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestCardHold keeps a hold at a card across the restart of the card's attacher, until its
// context ends.
func TestCardHold(t *testing.T) {
	dir := t.TempDir()
	socket, end := serveCard(t, dir)
	conn, err := rpc.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := &remote.Card{Card: attacherv1.NewCardClient(conn)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := c.Hold(ctx, "converter"); err != nil {
		t.Fatal(err)
	}
	other, err := rpc.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	// taken tells whether somebody else has the hold.
	taken := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		stream, err := attacherv1.NewCardClient(other).Hold(ctx, &attacherv1.HoldRequest{Owner: "converter"}, grpc.WaitForReady(true))
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil && !errors.Is(err, kind.InUse) {
			t.Fatal(err)
		}
		return err != nil
	}
	eventually := func(what string, want bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); taken() != want; time.Sleep(300 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	eventually("the hold is not there", true)
	end()
	_, end = serveCard(t, dir)
	defer func() { end() }()
	eventually("the hold was not taken again after a restart", true)
	if err := c.Hold(ctx, "converter"); err != nil {
		t.Errorf("hold again what is held: %v", err)
	}
	cancel()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	eventually("the hold outlives its context", false)
}
