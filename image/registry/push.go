package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/kind"
)

// Pusher writes to one repository. It may be used concurrently.
type Pusher struct {
	client *Client
	repo   name.Repository
	pusher *remote.Pusher
}

// Pusher returns a pusher for repo. Nothing is contacted yet.
func (c *Client) Pusher(repo name.Repository) (*Pusher, error) {
	p, err := remote.NewPusher(remote.WithTransport(c.base()), remote.WithAuthFromKeychain(c.keychain))
	if err != nil {
		return nil, Explain("prepare to push to "+repo.String(), err)
	}
	return &Pusher{client: c, repo: repo, pusher: p}, nil
}

// Check finds out whether pushing is allowed, by starting an upload and taking it
// back: registries differ in what their tokens tell.
func (p *Pusher) Check(ctx context.Context) error {
	what := "push to " + p.repo.String()
	client, err := p.client.authenticated(ctx, p.repo, transport.PushScope)
	if err != nil {
		return Explain(what, err)
	}
	url := p.repo.Scheme() + "://" + p.repo.RegistryStr() + "/v2/" + p.repo.RepositoryStr() + "/blobs/uploads/"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return Explain(what, err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return Explain(what, err)
	}
	defer resp.Body.Close()
	if err := transport.CheckError(resp, http.StatusAccepted, http.StatusCreated); err != nil {
		return Explain(what, err)
	}
	location, err := resp.Location()
	if err != nil {
		return nil // allowed; nothing to take back
	}
	if req, err = http.NewRequestWithContext(ctx, http.MethodDelete, location.String(), nil); err == nil {
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
		}
	}
	return nil
}

// Blob makes the repository hold blob d and returns how many bytes were sent for
// it: none when it is there already, or could be mounted from the repository from
// (if not nil) of the same registry. Only otherwise is open called, possibly again
// after a failed attempt.
func (p *Pusher) Blob(ctx context.Context, d ocispec.Descriptor, from *name.Repository, open func(context.Context) (io.ReadCloser, error)) (int64, error) {
	hash, err := v1.NewHash(d.Digest.String())
	if err != nil {
		return 0, kind.Errorf(kind.Unsupported, "push blob %.100q: only sha256 digests are supported", d.Digest)
	}
	l := &layer{ctx: ctx, hash: hash, descriptor: d, open: open}
	var out v1.Layer = l
	if from != nil && from.RegistryStr() == p.repo.RegistryStr() && from.RepositoryStr() != p.repo.RepositoryStr() {
		out = &remote.MountableLayer{Layer: l, Reference: from.Digest(d.Digest.String())}
	}
	if err := p.pusher.Upload(ctx, p.repo, out); err != nil {
		if l.err != nil { // ours, with its kind
			return 0, l.err
		}
		return 0, Explain(fmt.Sprintf("push blob %s to %s", d.Digest, p.repo), err)
	}
	return l.sent, nil
}

// Manifest pushes raw under tag, or by its digest when tag is empty.
func (p *Pusher) Manifest(ctx context.Context, mediaType string, raw []byte, tag string) error {
	var ref name.Reference = p.repo.Digest(digest.FromBytes(raw).String())
	if tag != "" {
		ref = p.repo.Tag(tag)
	}
	if err := p.pusher.Push(ctx, ref, manifest{raw, mediaType}); err != nil {
		return Explain("push manifest "+ref.String(), err)
	}
	return nil
}

type manifest struct {
	raw       []byte
	mediaType string
}

func (m manifest) RawManifest() ([]byte, error)        { return m.raw, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.MediaType(m.mediaType), nil }

// layer is a blob as the pusher wants to see it. Its bytes are asked for only when
// they must be sent. One goroutine uses it.
type layer struct {
	ctx        context.Context // of the one Upload it lives for
	hash       v1.Hash
	descriptor ocispec.Descriptor
	open       func(context.Context) (io.ReadCloser, error)
	sent       int64
	err        error
}

func (l *layer) Digest() (v1.Hash, error) { return l.hash, nil }
func (l *layer) DiffID() (v1.Hash, error) { return l.hash, nil }
func (l *layer) Size() (int64, error)     { return l.descriptor.Size, nil }
func (l *layer) MediaType() (types.MediaType, error) {
	return types.MediaType(l.descriptor.MediaType), nil
}
func (l *layer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

func (l *layer) Compressed() (io.ReadCloser, error) {
	r, err := l.open(l.ctx)
	if err != nil {
		l.err = err
		return nil, err
	}
	l.sent = l.descriptor.Size
	return r, nil
}
