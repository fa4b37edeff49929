package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Registry is a running OCI registry, plain HTTP.
type Registry struct {
	Address string // host:port, the first part of references
	Dir     string // the registry's storage
	Link    *Link  // nil when it listens on this machine's loopback
	*Process
}

// RegistryOptions say how a registry runs.
type RegistryOptions struct {
	Behind *Link // run inside this link's namespace; nil for this machine's loopback

	// User and Password, when set, are demanded of every client.
	User, Password string
}

// StartRegistry starts Debian's docker-registry with an empty storage of its own.
func (l *Lab) StartRegistry(ctx context.Context, o RegistryOptions) (*Registry, error) {
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		return nil, fmt.Errorf("docker-registry is not installed: run make deps: %w", err)
	}
	name := fmt.Sprintf("registry%d", labNumber.Add(1))
	dir, err := l.Path(name, "data")
	if err != nil {
		return nil, err
	}
	host, port := "127.0.0.1", 5000
	if o.Behind != nil {
		host = o.Behind.Peer
	} else if port, err = FreePort(); err != nil {
		return nil, err
	}
	address := net.JoinHostPort(host, strconv.Itoa(port))
	config := fmt.Sprintf("version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n  secret: %s\n", dir, address, name)
	if o.User != "" {
		hash, err := bcryptLine(o.User, o.Password)
		if err != nil {
			return nil, err
		}
		passwords := filepath.Join(l.Dir, name, "htpasswd")
		if err := os.WriteFile(passwords, []byte(hash), 0o600); err != nil {
			return nil, err
		}
		config += fmt.Sprintf("auth:\n  htpasswd:\n    realm: lab\n    path: %s\n", passwords)
	}
	configFile := filepath.Join(l.Dir, name, "config.yml")
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		return nil, err
	}
	process, err := l.Start(Spec{Name: name, Args: []string{program, "serve", configFile}, Network: o.Behind})
	if err != nil {
		return nil, err
	}
	r := &Registry{Address: address, Dir: dir, Link: o.Behind, Process: process}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err = poll(ctx, 20*time.Millisecond, process.alive, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/v2/", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK && response.StatusCode != http.StatusUnauthorized {
			return fmt.Errorf("status %s", response.Status)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("registry at %s: %w", address, err)
	}
	return r, nil
}

// Ref returns the reference of a repository and tag in the registry.
func (r *Registry) Ref(repository, tag string) string {
	return r.Address + "/" + repository + ":" + tag
}

// Blob returns the path of a blob's content in the registry's storage.
func (r *Registry) Blob(digest string) string {
	algorithm, hex, _ := strings.Cut(digest, ":")
	return filepath.Join(r.Dir, "docker/registry/v2/blobs", algorithm, hex[:2], hex, "data")
}

// FreePort returns a TCP port of the loopback that nobody listens on now.
func FreePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// bcryptLine returns a line of an htpasswd file. The C library of Debian hashes with
// bcrypt, the only form the registry takes, and perl is always there.
func bcryptLine(user, password string) (string, error) {
	out, err := exec.Command("perl", "-e", "print crypt($ARGV[0], q($2b$05$thawthawthawthawthawtu))", password).Output()
	if err != nil || !strings.HasPrefix(string(out), "$2b$") {
		return "", fmt.Errorf("hash a password for the registry: %q: %w", out, err)
	}
	return user + ":" + string(out) + "\n", nil
}
