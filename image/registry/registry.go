// Package registry talks to OCI registries for image conversion: credentials, TLS,
// manifests, and blobs that resume where a broken connection left them.
//
// Names, tokens and uploads are go-containerregistry's. The package knows nothing
// of blocks. Its errors never hold a credential or the query of a URL, which for
// blob stores is one.
package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/kind"
)

// MaxManifestBytes bounds a manifest or index: the size that registries are
// required to accept (OCI distribution, "pushing manifests").
const MaxManifestBytes = 4 << 20

// stall is how long a blob may deliver nothing before its connection is given up;
// the caller resumes on a new one.
const stall = 60 * time.Second

// Media types of manifests, asked for in this order. Schema 1 is asked for so that
// a registry that has nothing else says so instead of converting.
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex,
	ocispec.MediaTypeImageManifest,
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.v1+prettyjws",
	"application/vnd.docker.distribution.manifest.v1+json",
}

// Options says how to reach registries.
type Options struct {
	PlainHTTP       bool   // allow registries without TLS
	CAFile          string // PEM certificates to trust besides the system's
	DockerConfigDir string // directory of config.json; empty is docker's default
}

// Client is the connection to any number of registries. It may be used
// concurrently.
type Client struct {
	options   Options
	transport *http.Transport
	guard     *guard
	keychain  *keychain
}

// New returns a client. Nothing is contacted before it is needed. Files that options
// name and that cannot be used are an error.
func New(options Options) (*Client, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if options.CAFile != "" {
		pem, err := os.ReadFile(options.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read CA file: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, kind.Errorf(kind.Invalid, "CA file %s holds no PEM certificate", options.CAFile)
		}
	}
	if dir := options.DockerConfigDir; dir != "" {
		info, err := os.Stat(dir)
		if err != nil {
			return nil, fmt.Errorf("docker configuration: %w", err)
		}
		if !info.IsDir() {
			return nil, kind.Errorf(kind.Invalid, "docker configuration %s is a file: name the directory that config.json is in", dir)
		}
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           dialer.DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: stall,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		// A blob's digest is that of the bytes as stored.
		DisableCompression: true,
	}
	return &Client{
		options:   options,
		transport: t,
		guard:     &guard{inner: t, plainHTTP: options.PlainHTTP, untrue: map[string]error{}},
		keychain:  &keychain{dir: options.DockerConfigDir},
	}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Parse parses a reference with a tag or digest; without one, the tag is latest.
func (c *Client) Parse(reference string) (name.Reference, error) {
	options := []name.Option{name.WithDefaultTag("latest")}
	if c.options.PlainHTTP {
		options = append(options, name.Insecure)
	}
	ref, err := name.ParseReference(reference, options...)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "%.200q is not an image reference: write it as HOST/NAME:TAG or HOST/NAME@sha256:DIGEST, NAME in lower case", reference)
	}
	return ref, nil
}

// base is the transport below authentication. It refuses what would send
// credentials or images in the clear without being asked to: the library below
// falls back from TLS by itself for addresses it takes for local.
func (c *Client) base() http.RoundTripper { return c.guard }

type guard struct {
	inner     http.RoundTripper
	plainHTTP bool

	mu     sync.Mutex
	untrue map[string]error // guarded by mu: by host, why its certificate is not to be trusted
}

func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !g.plainHTTP && !loopback(r.URL.Hostname()) {
		return nil, kind.Errorf(kind.Denied, "%s without TLS: allow it with --plain-http", r.URL.Host)
	}
	if r.URL.Scheme != "https" {
		// Who has TLS but not the right certificate is not spoken to without TLS.
		g.mu.Lock()
		err := g.untrue[r.URL.Host]
		g.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	resp, err := g.inner.RoundTrip(r)
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &certificate) {
		g.mu.Lock()
		g.untrue[r.URL.Host] = err // as many as registries and the stores they redirect to
		g.mu.Unlock()
	}
	if err == nil && resp.StatusCode >= http.StatusBadRequest {
		// The library below calls an error that is too long something else.
		resp.Body = &bounded{io.LimitReader(resp.Body, maxErrorBytes), resp.Body}
	}
	return resp, err
}

// maxErrorBytes bounds what is read of a registry's words about an error.
const maxErrorBytes = 32 << 10

type bounded struct {
	io.Reader
	io.Closer
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// keychain finds credentials as docker does: config.json's auths, credHelpers and
// credsStore.
type keychain struct {
	dir string

	mu   sync.Mutex
	file *configfile.ConfigFile // guarded by mu
}

// Resolve implements authn.Keychain.
func (k *keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.file == nil {
		dir := k.dir
		if dir == "" {
			dir = os.Getenv("DOCKER_CONFIG")
		}
		file, err := config.Load(dir) // an empty dir is ~/.docker; no file is no error
		if err != nil {
			// The parser's message may quote the file.
			return nil, kind.Errorf(kind.Invalid, "docker configuration config.json in %q cannot be read as JSON with credentials: repair it, or name another directory with --docker-config", dir)
		}
		k.file = file
	}
	// As docker: by repository first, which helpers and newer files may have, then
	// by registry; Docker Hub has a name of its own.
	for _, key := range []string{target.String(), target.RegistryStr()} {
		if key == name.DefaultRegistry {
			key = authn.DefaultAuthKey
		}
		auth, err := k.file.GetAuthConfig(key)
		if err != nil {
			return nil, kind.Errorf(kind.Denied, "the credential helper that docker's config.json names for %s failed: %s", target.RegistryStr(), printable(err.Error()))
		}
		auth.ServerAddress = ""
		if auth == (types.AuthConfig{}) {
			continue
		}
		return authn.FromConfig(authn.AuthConfig{
			Username:      auth.Username,
			Password:      auth.Password,
			Auth:          auth.Auth,
			IdentityToken: auth.IdentityToken,
			RegistryToken: auth.RegistryToken,
		}), nil
	}
	return authn.Anonymous, nil
}

// Repository is one repository, for reading.
type Repository struct {
	client *Client
	repo   name.Repository

	mu   sync.Mutex
	http *http.Client // guarded by mu: nil until the registry was asked how it authenticates
}

// Repository returns repo. Nothing is contacted yet.
func (c *Client) Repository(repo name.Repository) *Repository {
	return &Repository{client: c, repo: repo}
}

// Name is the repository.
func (r *Repository) Name() name.Repository { return r.repo }

func (c *Client) authenticated(ctx context.Context, repo name.Repository, action string) (*http.Client, error) {
	auth, err := c.keychain.Resolve(repo)
	if err != nil {
		return nil, err
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, transport.NewRetry(c.base()), []string{repo.Scope(action)})
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: rt}, nil
}

func (r *Repository) session(ctx context.Context) (*http.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.http == nil {
		h, err := r.client.authenticated(ctx, r.repo, transport.PullScope)
		if err != nil {
			return nil, err
		}
		r.http = h
	}
	return r.http, nil
}

func (r *Repository) get(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	client, err := r.session(ctx)
	if err != nil {
		return nil, err
	}
	url := r.repo.Scheme() + "://" + r.repo.RegistryStr() + "/v2/" + r.repo.RepositoryStr() + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header = header
	return client.Do(req)
}

// Manifest fetches the manifest or index that reference, a tag or digest, names.
func (r *Repository) Manifest(ctx context.Context, reference string) (ocispec.Descriptor, []byte, error) {
	what := fmt.Sprintf("fetch manifest %s of %s", reference, r.repo)
	resp, err := r.get(ctx, "/manifests/"+reference, http.Header{"Accept": manifestTypes})
	if err != nil {
		return ocispec.Descriptor{}, nil, Explain(what, err)
	}
	defer resp.Body.Close()
	if err := transport.CheckError(resp, http.StatusOK); err != nil {
		return ocispec.Descriptor{}, nil, Explain(what, err)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifestBytes+1))
	if err != nil {
		return ocispec.Descriptor{}, nil, Explain(what, err)
	}
	if len(raw) > MaxManifestBytes {
		return ocispec.Descriptor{}, nil, kind.Errorf(kind.Invalid, "%s: it is larger than %d bytes", what, MaxManifestBytes)
	}
	got := digest.FromBytes(raw)
	if strings.Contains(reference, ":") && got.String() != reference {
		return ocispec.Descriptor{}, nil, kind.Errorf(kind.Corrupt, "%s: the registry sent bytes with digest %s", what, got)
	}
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return ocispec.Descriptor{MediaType: strings.TrimSpace(mediaType), Digest: got, Size: int64(len(raw))}, raw, nil
}

// Blob opens a blob at offset. What is read is not verified. A connection that
// delivers nothing for a minute fails with kind.Unavailable.
func (r *Repository) Blob(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	what := fmt.Sprintf("fetch blob %s of %s", d, r.repo)
	ctx, cancel := context.WithCancelCause(ctx)
	header := http.Header{}
	if offset > 0 {
		header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	resp, err := r.get(ctx, "/blobs/"+d.String(), header)
	if err == nil {
		err = transport.CheckError(resp, http.StatusOK, http.StatusPartialContent)
		if err != nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		cancel(nil)
		return nil, Explain(what, err)
	}
	b := &body{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, what: what}
	b.timer = time.AfterFunc(stall, func() {
		cancel(kind.Errorf(kind.Unavailable, "no data for %s", stall))
	})
	skip := offset
	if resp.StatusCode == http.StatusPartialContent {
		if !strings.HasPrefix(resp.Header.Get("Content-Range"), "bytes "+strconv.FormatInt(offset, 10)+"-") {
			b.Close()
			return nil, kind.Errorf(kind.Invalid, "%s: asked for bytes from %d, the registry answered %.60q", what, offset, resp.Header.Get("Content-Range"))
		}
		skip = 0
	}
	// A registry without ranges starts over.
	if _, err := io.CopyN(io.Discard, b, skip); err != nil {
		b.Close()
		return nil, Explain(what, err)
	}
	return b, nil
}

type body struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	what   string
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.Reset(stall)
	}
	if err != nil && err != io.EOF {
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
		err = Explain(b.what, err)
	}
	return n, err
}

func (b *body) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
