package rpc

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/thaw-project/thaw/certificate"
	"github.com/thaw-project/thaw/kind"
)

func TestAllow(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	ca := filepath.Join(dir, "ca")
	if _, err := certificate.NewAuthority(ca, now); err != nil {
		t.Fatal(err)
	}
	files := func(i certificate.Issue) Files {
		f, err := certificate.New(ca, t.TempDir(), i, now)
		if err != nil {
			t.Fatal(err)
		}
		return Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA}
	}
	credentials, err := ServerTLS(files(certificate.Issue{Node: "store", Addresses: []string{"127.0.0.1"}}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// call makes one call and one stream as a peer of that name, on a socket when it has none.
	call := func(service, peer string, names ...string) (unary, stream error) {
		t.Helper()
		options := append(ServerOptions(), Allow(service, names...)...)
		network, address := "unix", filepath.Join(t.TempDir(), "s")
		if peer != "" {
			options = append(options, credentials)
			network, address = "tcp", "127.0.0.1:0"
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(options...)
		healthapi.RegisterHealthServer(s, health.NewServer())
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(l) }()
		defer func() { s.Stop(); <-done }()
		conn, err := Dial(address)
		if peer != "" {
			conn, err = DialTLS(l.Addr().String(), files(certificate.Issue{Node: peer}))
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := healthapi.NewHealthClient(conn)
		_, unary = c.Check(ctx, &healthapi.HealthCheckRequest{}, grpc.WaitForReady(true))
		w, err := c.Watch(ctx, &healthapi.HealthCheckRequest{})
		if err == nil {
			_, err = w.Recv()
		}
		return unary, err
	}
	for _, c := range []struct {
		name, service, peer string
		names               []string
		want                kind.Kind
	}{
		{"a name on the list", "grpc.health.v1.Health", "builder-1", []string{"builder-0", "builder-1"}, ""},
		{"a name that is not", "grpc.health.v1.Health", "builder-10", []string{"builder-0", "builder-1"}, kind.Denied},
		{"every service", "", "builder-10", []string{"builder-1"}, kind.Denied},
		{"nobody", "grpc.health.v1.Health", "builder-1", nil, kind.Denied},
		{"another service", "grpc.health.v1.Healt", "builder-1", nil, ""},
		{"a socket", "grpc.health.v1.Health", "", nil, ""},
	} {
		if unary, stream := call(c.service, c.peer, c.names...); kind.Of(unary) != c.want || kind.Of(stream) != c.want || (c.want == "") != (unary == nil && stream == nil) {
			t.Errorf("%s: got %v and %v, want kind %q", c.name, unary, stream, c.want)
		}
	}
}
