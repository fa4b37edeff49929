package rpc

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/thaw-project/thaw/certificate"
)

// TestSlowHandshake connects to a store whose first answer takes longer than the pauses
// between attempts.
func TestSlowHandshake(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	ca := filepath.Join(dir, "ca")
	if _, err := certificate.NewAuthority(ca, now); err != nil {
		t.Fatal(err)
	}
	files := func(i certificate.Issue) Files {
		f, err := certificate.New(ca, filepath.Join(dir, i.Node), i, now)
		if err != nil {
			t.Fatal(err)
		}
		return Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA}
	}
	creds, err := ServerTLS(files(certificate.Issue{Node: "store", Addresses: []string{"127.0.0.1"}}))
	if err != nil {
		t.Fatal(err)
	}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	server := grpc.NewServer(creds)
	healthapi.RegisterHealthServer(server, health.NewServer())
	behind, front := listen(), listen()
	var owned sync.WaitGroup
	defer owned.Wait()
	owned.Go(func() { _ = server.Serve(behind) }) // ends with Stop
	defer server.Stop()
	defer front.Close()
	owned.Go(func() { slow(front, behind.Addr().String(), 2*reconnectMost) })

	conn, err := DialTLS(front.Addr().String(), files(certificate.Issue{Node: "node"}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := healthapi.NewHealthClient(conn).Check(ctx, &healthapi.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Error(err)
	}
}

// slow passes connections on, and keeps the first answer of each back for a while. It
// ends with the listener, when the connections have ended.
func slow(l net.Listener, to string, delay time.Duration) {
	var owned sync.WaitGroup
	defer owned.Wait()
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", to)
		if err != nil {
			client.Close()
			continue
		}
		pass := func(to, from net.Conn, delay time.Duration) {
			first := make([]byte, 1)
			n, _ := io.ReadFull(from, first)
			time.Sleep(delay)
			_, _ = to.Write(first[:n])
			_, _ = io.Copy(to, from)
			to.Close()
			from.Close()
		}
		owned.Go(func() { pass(server, client, 0) })
		owned.Go(func() { pass(client, server, delay) })
	}
}
