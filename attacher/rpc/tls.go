package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
)

// Files are what one end of a mutually authenticated connection needs, as PEM files.
type Files struct {
	Certificate string // of this end, with its chain
	Key         string
	CA          string // certificates that the other end's must be signed by
}

func (f Files) pair() (*tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, kind.Wrap(kind.Invalid, fmt.Errorf("load certificate %s with key %s: %w", f.Certificate, f.Key, err))
	}
	return &c, nil
}

func (f Files) pool() (*x509.CertPool, error) {
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, kind.Errorf(kind.Invalid, "certificate authority %s holds no certificate", f.CA)
	}
	return pool, nil
}

// server reads the files again for each connection, so that renewed ones count without
// a restart.
func (f Files) server() (*tls.Config, error) {
	pair, err := f.pair()
	if err != nil {
		return nil, err
	}
	pool, err := f.pool()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*pair},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		NextProtos: []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := nodeOf(state)
			return err
		},
	}, nil
}

// ServerTLS returns the option that lets in only clients whose certificate names a
// node and is signed by f.CA. Errors in the files are found now; they are read again
// for each connection.
func ServerTLS(f Files) (grpc.ServerOption, error) {
	first, err := f.server()
	if err != nil {
		return nil, err
	}
	config := first.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return f.server() }
	return grpc.Creds(credentials.NewTLS(config)), nil
}

// DialTLS returns a connection to the attacher at a TCP address ("host:port"), whose
// certificate must be for that host and signed by f.CA. It does not wait for the
// server: the first call does. The own certificate is read again for each connection.
func DialTLS(address string, f Files, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	if _, err := f.pair(); err != nil {
		return nil, err
	}
	pool, err := f.pool()
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return f.pair() },
	}
	options := append(DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(config)), connecting(handshakeMost))
	conn, err := grpc.NewClient("passthrough:///"+address, append(options, more...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to attacher at %s: %w", address, err)
	}
	return conn, nil
}

// Node returns the name of the node that its certificate gives the peer of a call; ok is
// false for a peer on a Unix socket, whose access control is the socket's mode.
func Node(ctx context.Context) (name string, ok bool, err error) {
	p, _ := peer.FromContext(ctx)
	if p == nil || p.AuthInfo == nil {
		return "", false, nil
	}
	info, isTLS := p.AuthInfo.(credentials.TLSInfo)
	if !isTLS {
		if p.AuthInfo.AuthType() == "insecure" { // what a server without credentials says
			return "", false, nil
		}
		return "", true, kind.Errorf(kind.Denied, "peer authenticated by %.40s, which names no node", p.AuthInfo.AuthType())
	}
	name, err = nodeOf(info.State)
	return name, true, err
}

// nodeOf takes a node's name from its certificate: the subject's common name, or when
// that is empty the only DNS name.
func nodeOf(state tls.ConnectionState) (string, error) {
	if len(state.PeerCertificates) == 0 || len(state.VerifiedChains) == 0 {
		return "", kind.Errorf(kind.Denied, "peer without a verified certificate")
	}
	leaf := state.PeerCertificates[0]
	name := leaf.Subject.CommonName
	if name == "" && len(leaf.DNSNames) == 1 {
		name = leaf.DNSNames[0]
	}
	if err := identity.CheckNode(name); err != nil {
		return "", kind.Errorf(kind.Denied, "certificate %.80q names no node: %w", leaf.Subject, err)
	}
	return name, nil
}

// LocalAddress is the IP address by which the peer of a call reached this server; empty
// for a peer on a Unix socket.
func LocalAddress(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return ""
	}
	if a, ok := p.LocalAddr.(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap().String()
	}
	return ""
}
