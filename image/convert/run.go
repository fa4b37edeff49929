package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/failpoint"
	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/source"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

const (
	// pushes is how many blobs are pushed at once, besides the layer being applied.
	pushes = 3
	// chainAttempts bounds how often a chain of blocks is begun again because
	// somebody removed one of its finished blocks meanwhile.
	chainAttempts = 3
)

// conversion is one call of Convert.
type conversion struct {
	options Options
	source  source.Source
	dest    destination
	store   *store
	plan    *plan
	target  string // name of the target that holds the blocks
	sink    sync.Mutex

	pushed struct {
		sync.Mutex
		bytes int64
	}
}

// Convert converts an image and returns what it did. Errors have a kind: Denied for
// credentials, NotFound for an unknown reference, Corrupt for a digest that does not
// match, NoSpace, Canceled, Unsupported, Invalid. When it fails nothing is pushed under
// Dest's tag; finished blocks stay and are reused by the next attempt.
func Convert(ctx context.Context, options Options) (_ Result, err error) {
	begin := time.Now()
	options.EnsureDefaults()
	if err := options.Validate(); err != nil {
		return Result{}, err
	}
	defer func() {
		if err != nil && ctx.Err() != nil && kind.Of(err) != kind.Canceled {
			err = kind.Errorf(kind.Canceled, "%w (%w)", context.Cause(ctx), err)
		}
	}()
	client, err := registry.New(registry.Options{PlainHTTP: options.PlainHTTP, CAFile: options.CAFile, DockerConfigDir: options.DockerConfigDir})
	if err != nil {
		return Result{}, err
	}
	defer client.Close()
	src, err := source.Open(ctx, options.Source, client, options.SpoolDir)
	if err != nil {
		return Result{}, advise(err)
	}
	defer src.Close()
	c := &conversion{options: options, source: src}
	if c.dest, err = openDestination(options.Dest, client, src); err != nil {
		return Result{}, err
	}
	if c.plan, err = makePlan(ctx, src, options.Platforms); err != nil {
		return Result{}, advise(err)
	}
	// Before hours of work, not after.
	if err := c.dest.check(ctx); err != nil {
		return Result{}, err
	}
	c.store = &store{client: options.Attacher, owner: "convert-" + uuid.NewString(), logger: options.Logger}
	result, err := c.run(ctx)
	result.Duration = time.Since(begin)
	return result, err
}

func (c *conversion) run(ctx context.Context) (Result, error) {
	state, err := call(ctx, c.store.client.GetStore, &attacherv1.GetStoreRequest{})
	if err != nil {
		return Result{}, fmt.Errorf("ask the attacher for its store: %w", err)
	}
	c.target = state.GetTarget()
	// The hold outlives ctx, so that what a cancelled conversion cleans up is
	// still its own.
	release, err := c.store.hold(context.WithoutCancel(ctx))
	if err != nil {
		return Result{}, fmt.Errorf("hold what is being written: %w", err)
	}
	defer release()

	fetcher := spool.NewFetcher(ctx, c.source, c.options.SpoolDir)
	defer fetcher.Close()
	result := Result{Source: c.options.Source, Dest: c.dest.reference()}
	for _, e := range c.plan.entries {
		if e.image == nil {
			if err := c.passThrough(ctx, fetcher, e.descriptor); err != nil {
				return result, fmt.Errorf("attestation %s: %w", e.descriptor.Digest, err)
			}
			continue
		}
		converted, err := c.image(ctx, fetcher, e.image)
		if err != nil {
			return result, err
		}
		result.Images = append(result.Images, converted)
		result.Digest = converted.ManifestDigest
	}
	if c.plan.index != nil {
		raw, err := c.plan.document()
		if err != nil {
			return result, err
		}
		d := describe(c.plan.root.MediaType, raw)
		if err := c.dest.manifest(ctx, d, raw, true); err != nil {
			return result, err
		}
		result.Digest = d.Digest.String()
	}
	result.FetchedBytes = fetcher.FetchedBytes()
	result.PushedBytes = c.pushed.bytes
	return result, nil
}

// image converts one platform's image.
func (c *conversion) image(ctx context.Context, fetcher *spool.Fetcher, i *image) (Image, error) {
	i.nameBlocks(&c.options, c.dest.repository())
	out := Image{
		Platform:         i.platform,
		Mode:             c.options.Mode,
		Filesystem:       c.options.Filesystem,
		VirtualSizeBytes: c.options.VirtualSizeBytes,
		Soldier:          i.soldier,
		Layers:           make([]Layer, len(i.layers)),
	}
	for n, l := range i.layers {
		out.Layers[n] = Layer{Digest: l.descriptor.Digest.String(), DiffID: l.diffID.String(), ChainID: l.chainID.String(), Block: l.block}
	}
	t := newTracker(&c.sink, c.options.Progress, i)

	g, gctx := errgroup.WithContext(ctx)
	pushed := make(chan struct{}, pushes)
	g.Go(func() error { return c.writeChain(gctx, fetcher, i, t, out.Layers) })
	g.Go(func() error {
		_, err := c.dest.blob(gctx, i.config, func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(i.configRaw)), nil
		})
		return err
	})
	for n := range i.layers {
		g.Go(func() error {
			select {
			case pushed <- struct{}{}:
				defer func() { <-pushed }()
			case <-gctx.Done():
				return kind.Wrap(kind.Canceled, context.Cause(gctx))
			}
			sent, err := c.push(gctx, fetcher, i.layers[n].descriptor, func(fetched int64) {
				t.update(n, false, func(e *Event) { e.FetchedBytes = fetched })
			})
			out.Layers[n].PushedBytes = sent
			t.update(n, true, func(e *Event) { e.Pushed = err == nil })
			return i.layerError(n, err)
		})
	}
	err := g.Wait()
	for n := range out.Layers {
		out.Layers[n].FetchedBytes = t.get(n).FetchedBytes
	}
	if err != nil {
		return out, err
	}
	if err := i.annotate(&c.options, c.target); err != nil {
		return out, err
	}
	out.ManifestDigest = i.converted.Digest.String()
	return out, c.publish(ctx, i)
}

// push makes the destination hold a blob of the source.
func (c *conversion) push(ctx context.Context, fetcher *spool.Fetcher, d ocispec.Descriptor, progress func(int64)) (int64, error) {
	var used []*spool.Blob
	defer func() {
		for _, b := range used {
			b.Release()
		}
	}()
	sent, err := c.dest.blob(ctx, d, func(ctx context.Context) (io.ReadCloser, error) {
		b := fetcher.Get(d, progress)
		used = append(used, b)
		// Nothing leaves that is not what its digest says.
		if err := b.Verified(ctx); err != nil {
			return nil, advise(err)
		}
		return io.NopCloser(b.NewReader(ctx)), nil
	})
	c.pushed.Lock()
	c.pushed.bytes += sent
	c.pushed.Unlock()
	return sent, err
}

// passThrough copies a manifest and its blobs as they are.
func (c *conversion) passThrough(ctx context.Context, fetcher *spool.Fetcher, d ocispec.Descriptor) error {
	raw, err := c.source.Manifest(ctx, d)
	if err != nil {
		return err
	}
	blobs, err := blobsOf(raw)
	if err != nil {
		return err
	}
	for _, b := range blobs {
		if _, err := c.push(ctx, fetcher, b, nil); err != nil {
			return err
		}
	}
	return c.dest.manifest(ctx, d, raw, false)
}

// publish records the image and pushes its manifest, in this order: a manifest
// that anybody can see names blocks that stay.
func (c *conversion) publish(ctx context.Context, i *image) error {
	record := &attacherv1.Image{
		Reference:        c.dest.reference(),
		Source:           c.options.Source,
		ManifestDigest:   i.converted.Digest.String(),
		Platform:         i.platform,
		Mode:             string(c.options.Mode),
		Filesystem:       string(c.options.Filesystem),
		VirtualSizeBytes: c.options.VirtualSizeBytes,
	}
	for _, l := range i.layers {
		record.Blocks = append(record.Blocks, l.block)
		record.ChainIds = append(record.ChainIds, l.chainID.String())
	}
	record.Blocks = append(record.Blocks, i.soldier)
	before, err := call(ctx, c.store.client.GetImage, &attacherv1.GetImageRequest{Reference: record.Reference, Platform: record.Platform})
	if err != nil && !errors.Is(err, kind.NotFound) {
		return fmt.Errorf("look up image %s: %w", record.Reference, err)
	}
	if _, err := call(ctx, c.store.client.PutImage, &attacherv1.PutImageRequest{Image: record}); err != nil {
		return fmt.Errorf("record image %s: %w", record.Reference, err)
	}
	failpoint.Reach("convert.publish: recorded")
	err = c.dest.manifest(ctx, i.converted, i.convertedRaw, c.plan.index == nil)
	failpoint.Reach("convert.publish: pushed")
	if err == nil {
		return nil
	}
	// Nobody got the manifest: the record goes back to what it was.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	var undo error
	if before != nil {
		_, undo = call(ctx, c.store.client.PutImage, &attacherv1.PutImageRequest{Image: before})
	} else {
		_, undo = call(ctx, c.store.client.DeleteImage, &attacherv1.DeleteImageRequest{Reference: record.Reference, Platform: record.Platform})
	}
	if undo != nil {
		c.options.Logger.Warn("image stays recorded although its manifest was not pushed: convert again or remove it", "image", record.Reference, "error", undo)
	}
	return err
}

// writeChain makes all blocks of an image, lowest first, and its soldier.
func (c *conversion) writeChain(ctx context.Context, fetcher *spool.Fetcher, i *image, t *tracker, out []Layer) error {
	for attempt := 1; ; attempt++ {
		err := c.writeChainOnce(ctx, fetcher, i, t, out)
		if err == nil || attempt == chainAttempts || !errors.Is(err, errBlockGone) {
			return err
		}
		c.options.Logger.Warn("a finished block was removed meanwhile, writing it again", "error", err)
	}
}

// errBlockGone marks that a block which was complete is not there any more.
var errBlockGone = errors.New("the block below was removed")

func (c *conversion) writeChainOnce(ctx context.Context, fetcher *spool.Fetcher, i *image, t *tracker, out []Layer) error {
	complete := make([]bool, len(i.layers))
	blobs := make([]*spool.Blob, len(i.layers))
	defer func() {
		for _, b := range blobs {
			if b != nil {
				b.Release()
			}
		}
	}()
	for n, l := range i.layers {
		var err error
		if complete[n], err = c.complete(ctx, l.block); err != nil {
			return err
		}
	}
	// All that will be needed is asked for now, so that it is fetched in the order
	// it is applied in and while layers below are.
	for n, l := range i.layers {
		if !complete[n] {
			blobs[n] = fetcher.Get(l.descriptor, func(fetched int64) {
				t.update(n, false, func(e *Event) { e.FetchedBytes = fetched })
			})
		}
	}
	for n := range i.layers {
		if complete[n] {
			out[n].Reused = out[n].Duration == 0 // unless an attempt before wrote it
			t.update(n, true, func(e *Event) { e.State = StateReused })
			continue
		}
		if err := c.writeBlock(ctx, i, n, blobs[n], t, &out[n]); err != nil {
			t.update(n, true, func(e *Event) { e.State = StateFailed })
			return i.layerError(n, err)
		}
		blobs[n].Release()
		blobs[n] = nil
	}
	leaf := i.layers[len(i.layers)-1].block
	_, err := call(ctx, c.store.client.CloneLvol, &attacherv1.CloneLvolRequest{Snapshot: leaf, Name: i.soldier, ReadOnly: true})
	failpoint.Reach("convert.soldier: cloned")
	return cloneError(leaf, i.soldier, err)
}

// advise says what to do about an error that the source is damaged.
func advise(err error) error {
	if kind.Of(err) == kind.Corrupt {
		return fmt.Errorf("%w: the source is damaged: build or push it again", err)
	}
	return err
}

// layerError says which layer err is about.
func (i *image) layerError(n int, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("layer %d of %d (%s) of %s: %w", n+1, len(i.layers), i.layers[n].descriptor.Digest, i.platform, err)
}

func cloneError(below, name string, err error) error {
	if errors.Is(err, kind.NotFound) {
		err = fmt.Errorf("%w: %w", errBlockGone, err)
	}
	if err != nil {
		return fmt.Errorf("clone %s as %s: %w", below, name, err)
	}
	return nil
}

// complete tells whether a block is there. It is complete then, because a block
// gets its name by the snapshot taken after its last write.
func (c *conversion) complete(ctx context.Context, name string) (bool, error) {
	l, err := c.store.lvol(ctx, name)
	switch {
	case err != nil:
		return false, fmt.Errorf("look for block %s: %w", name, err)
	case l == nil:
		return false, nil
	case !l.GetSnapshot() || l.GetSizeBytes() != c.options.VirtualSizeBytes:
		return false, kind.Errorf(kind.Exists, "lvol %s is not a block of %d bytes: somebody else made it; remove or rename it", name, c.options.VirtualSizeBytes)
	}
	return true, nil
}

func describe(mediaType string, raw []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}
