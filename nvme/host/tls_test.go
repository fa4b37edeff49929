package host_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/thaw-project/thaw/nvme/host"
	"github.com/thaw-project/thaw/target/nvmf"
)

// TestUpgrade runs everything over TLS through the seams that both sides leave for
// it, and refuses a peer that speaks in the clear.
func TestUpgrade(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	l := newLab(t, nvmf.Options{Handshake: 500 * time.Millisecond})
	const nqn = subNQN + "-tls"
	l.must(l.t1.CreateSubsystem(nvmf.SubsystemConfig{NQN: nqn, AllowAnyHost: true}))
	addr, err := l.t1.AddListener(nqn, nvmf.ListenerConfig{Address: "127.0.0.1:0", Upgrade: func(ctx context.Context, nc net.Conn) (net.Conn, error) {
		s := tls.Server(nc, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		return s, s.HandshakeContext(ctx)
	}})
	l.must(err)
	id, err := l.t1.AddNvmeNamespace(nqn, nvmf.NvmeNamespaceConfig{Device: newMemory(256 << 10)})
	l.must(err)
	d := tls.Dialer{Config: &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}}
	h := l.connect(host.Config{Portals: []string{addr}, SubNQN: nqn, Queues: 2, Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", addr)
	}})
	conform(t, l.open(h, id), 20)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := host.Connect(ctx, host.Config{Portals: []string{addr}, SubNQN: nqn}); err == nil {
		t.Error("a host in the clear is let in")
	}
}
