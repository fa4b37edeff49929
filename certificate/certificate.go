// Package certificate makes the certificates with which stores and nodes know each
// other, for sites that have no authority of their own: one self-signed authority, and
// certificates that name a machine.
//
// It knows nothing of what they are used for beyond that: a node's name is the common
// name of its certificate.
package certificate

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/thaw-project/thaw/attacher/identity"
	"github.com/thaw-project/thaw/kind"
)

// File names of an authority in its directory.
const (
	AuthorityCertificate = "ca.crt"
	AuthorityKey         = "ca.key"
)

// Validity of what is made.
const (
	authorityYears = 10
	// DefaultDays is how long an issued certificate is valid.
	DefaultDays = 365
	// MaxDays bounds that: nothing revokes a certificate before it expires.
	MaxDays = 3650
	// backdate is for clocks that differ.
	backdate = time.Hour
)

// Issue says what certificate to make.
type Issue struct {
	// Node is the name of the machine, see identity.CheckNode.
	Node string
	// Addresses are IP addresses and DNS names by which others reach it: what a store
	// needs. Without any the certificate is for connecting only.
	Addresses []string
	// Days of validity, DefaultDays if 0.
	Days int
}

// Files are the paths of what was made.
type Files struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
	CA          string `json:"ca"`
}

// NewAuthority makes an authority in dir, which is created. It is kind.Exists when there
// is one: nothing signed by the old one would be good any more.
func NewAuthority(dir string, now time.Time) (Files, error) {
	files := Files{Certificate: filepath.Join(dir, AuthorityCertificate), Key: filepath.Join(dir, AuthorityKey), CA: filepath.Join(dir, AuthorityCertificate)}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return files, fmt.Errorf("make directory for the authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return files, err
	}
	template, err := base(now)
	if err != nil {
		return files, err
	}
	template.Subject = pkix.Name{CommonName: "Thaw authority"}
	template.NotAfter = now.AddDate(authorityYears, 0, 0)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return files, fmt.Errorf("make the authority's certificate: %w", err)
	}
	return files, write(files, key, der)
}

// New makes a key and a certificate for a machine in out, signed by the authority in
// authorityDir, and copies the authority's certificate beside them. Existing files are
// kind.Exists.
func New(authorityDir, out string, i Issue, now time.Time) (Files, error) {
	files := Files{
		Certificate: filepath.Join(out, i.Node+".crt"), Key: filepath.Join(out, i.Node+".key"), CA: filepath.Join(out, AuthorityCertificate),
	}
	if i.Days == 0 {
		i.Days = DefaultDays
	}
	if err := identity.CheckNode(i.Node); err != nil {
		return files, err
	}
	if i.Days < 1 || i.Days > MaxDays {
		return files, kind.Errorf(kind.Invalid, "%d days of validity: must be 1 to %d", i.Days, MaxDays)
	}
	if i.Node == "ca" {
		return files, kind.Errorf(kind.Invalid, "node name ca: its files would be the authority's")
	}
	authority, authorityKey, err := load(authorityDir)
	if err != nil {
		return files, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return files, err
	}
	template, err := base(now)
	if err != nil {
		return files, err
	}
	template.Subject = pkix.Name{CommonName: i.Node}
	template.NotAfter = now.AddDate(0, 0, i.Days)
	if template.NotAfter.After(authority.NotAfter) {
		template.NotAfter = authority.NotAfter
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for _, a := range i.Addresses {
		switch ip := net.ParseIP(a); {
		case ip != nil:
			template.IPAddresses = append(template.IPAddresses, ip)
		case identity.CheckNode(a) == nil: // the same letters as a DNS name
			template.DNSNames = append(template.DNSNames, a)
		default:
			return files, kind.Errorf(kind.Invalid, "address %.160q is no IP address or DNS name", a)
		}
	}
	if len(i.Addresses) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority, key.Public(), authorityKey)
	if err != nil {
		return files, fmt.Errorf("sign the certificate of %s: %w", i.Node, err)
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return files, fmt.Errorf("make directory for the certificate: %w", err)
	}
	if err := write(files, key, der); err != nil {
		return files, err
	}
	err = writePEM(files.CA, "CERTIFICATE", authority.Raw, 0o644)
	if errors.Is(err, kind.Exists) { // of another node, or the authority's directory itself
		return files, sameAuthority(files.CA, authority)
	}
	return files, err
}

func sameAuthority(path string, authority *x509.Certificate) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if block, _ := pem.Decode(raw); block == nil || string(block.Bytes) != string(authority.Raw) {
		return kind.Errorf(kind.Exists, "%s is of another authority: choose another directory", path)
	}
	return nil
}

func base(now time.Time) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // RFC 5280, 4.1.2.2: at most 20 bytes
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-backdate)}, nil
}

func load(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certPath, keyPath := filepath.Join(dir, AuthorityCertificate), filepath.Join(dir, AuthorityKey)
	der, err := readPEM(certPath, "CERTIFICATE")
	if err != nil {
		return nil, nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil || !c.IsCA {
		return nil, nil, kind.Errorf(kind.Invalid, "%s is no certificate of an authority: %w", certPath, err)
	}
	if der, err = readPEM(keyPath, "PRIVATE KEY"); err != nil {
		return nil, nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	key, ok := k.(*ecdsa.PrivateKey)
	if err != nil || !ok || !key.PublicKey.Equal(c.PublicKey) {
		return nil, nil, kind.Errorf(kind.Invalid, "%s is not the key of %s: %w", keyPath, certPath, err)
	}
	return c, key, nil
}

func readPEM(path, label string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, kind.Errorf(kind.NotFound, "%s does not exist: make an authority with 'thaw certificate authority'", path)
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != label {
		return nil, kind.Errorf(kind.Invalid, "%s holds no %s in PEM", path, label)
	}
	return block.Bytes, nil
}

// write writes key before certificate: who finds a certificate finds its key.
func write(files Files, key *ecdsa.PrivateKey, der []byte) error {
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(files.Certificate); err == nil {
		return kind.Errorf(kind.Exists, "%s exists: remove it and its key first, or choose another directory", files.Certificate)
	}
	if err := writePEM(files.Key, "PRIVATE KEY", raw, 0o600); err != nil {
		return err
	}
	return writePEM(files.Certificate, "CERTIFICATE", der, 0o644)
}

func writePEM(path, label string, der []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return kind.Errorf(kind.Exists, "%s exists: remove it first, or choose another directory", path)
	}
	if err != nil {
		return err
	}
	err = pem.Encode(f, &pem.Block{Type: label, Bytes: der})
	return errors.Join(err, f.Sync(), f.Close())
}
