package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc"

	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/certificate"
	"github.com/thaw-project/thaw/kind"
)

func TestBridgeFlags(t *testing.T) {
	for _, args := range [][]string{
		{"--listen", "127.0.0.1:0"},
		{"--listen", "127.0.0.1:0", "--certificate", "c", "--key", "k", "--ca", "a"},
		{"--client", "a"},
		{"--listen", "127.0.0.1:0", "--certificate", "c", "--key", "k", "--ca", "a", "--client", "A B"},
		{"--log-level", "loud"},
		{"extra"},
	} {
		if _, code, err := run(t.Context(), append([]string{"bridge"}, args...)...); code != 2 {
			t.Errorf("%q: %d %v", args, code, err)
		}
	}
}

// TestBridge runs target and bridge, the bridge first, and calls it on its socket and over
// TCP as a client that may and as one that may not.
func TestBridge(t *testing.T) {
	dir, err := os.MkdirTemp("", "bridge-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	now := time.Now()
	ca := filepath.Join(dir, "ca")
	if _, err := certificate.NewAuthority(ca, now); err != nil {
		t.Fatal(err)
	}
	files := func(i certificate.Issue) attacherrpc.Files {
		f, err := certificate.New(ca, filepath.Join(dir, i.Node), i, now)
		if err != nil {
			t.Fatal(err)
		}
		return attacherrpc.Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA}
	}
	own := files(certificate.Issue{Node: "dpu", Addresses: []string{"127.0.0.1"}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	socket, target := filepath.Join(dir, "run", "bridge"), filepath.Join(dir, "run", "target")
	go func() {
		_, _, err := run(ctx, "bridge", "--target", target, "--socket", socket, "--log-level", "error",
			"--listen", address, "--certificate", own.Certificate, "--key", own.Key, "--ca", own.CA, "--client", "store")
		ended <- err
	}()
	go func() {
		_, _, err := run(ctx, "target", "--root", filepath.Join(dir, "t"), "--socket", target, "--log-level", "error")
		ended <- err
	}()
	ask := func(conn *grpc.ClientConn, err error) error {
		if err != nil {
			return err
		}
		defer conn.Close()
		for {
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			_, err = opiv1.NewFrontendNvmeServiceClient(conn).ListNvmeSubsystems(ctx, &opiv1.ListNvmeSubsystemsRequest{}, grpc.WaitForReady(true))
			cancel()
			if !errors.Is(err, kind.Unavailable) || errors.Is(err, context.DeadlineExceeded) {
				return err
			}
			time.Sleep(5 * time.Millisecond) // until the target is there
		}
	}
	if err := ask(attacherrpc.Dial(socket)); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", st, err)
	}
	if err := ask(attacherrpc.DialTLS(address, files(certificate.Issue{Node: "store"}))); err != nil {
		t.Error(err)
	}
	if err := ask(attacherrpc.DialTLS(address, files(certificate.Issue{Node: "node-7"}))); !errors.Is(err, kind.Denied) {
		t.Errorf("a client that is not named: %v", err)
	}
	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
