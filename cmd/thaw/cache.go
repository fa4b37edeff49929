package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/cache"
)

func newCache() *cobra.Command {
	var where place
	cmd := group("cache", "Look at the node's cache of what other machines store", cacheShow(&where), cachePrune(&where))
	where.register(cmd)
	return cmd
}

// cacheOptions says which cache the server of that place has.
func (p *place) cacheOptions() (cache.Options, error) {
	config, err := p.load()
	if err != nil {
		return cache.Options{}, err
	}
	o := cache.Options{Dir: config.Cache.Dir, SizeBytes: int64(config.Cache.Size), ReadAheadBytes: -1}
	if o.Dir == "" {
		o.Dir = config.Paths().Cache
	}
	return o, nil
}

func printCache(cmd *cobra.Command, out *output, c cache.Contents) error {
	return out.print(cmd.OutOrStdout(), c, func(w *tabwriter.Writer) {
		row(w, "DIRECTORY", "SIZE", "USED", "UNIT")
		row(w, c.Dir, bytesText(c.CapacityBytes), bytesText(c.UsedBytes), bytesText(c.UnitBytes))
	})
}

func cacheShow(where *place) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "show", Short: "Show what the cache holds", Args: noArgs,
		Long: `Show what the cache holds.

Works while the server runs and when it does not. Hits, misses and what was fetched are
in the server's metrics, thaw_cache_*.`,
		Example: "  thaw cache show --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := where.cacheOptions()
			if err != nil {
				return err
			}
			c, err := cache.Inspect(o.Dir)
			if err != nil {
				return err
			}
			return printCache(cmd, &out, c)
		},
	}
	out.register(cmd)
	return cmd
}

func cachePrune(where *place) *cobra.Command {
	var out output
	var keep string
	cmd := &cobra.Command{
		Use: "prune", Short: "Shrink the cache", Args: noArgs,
		Long: `Shrink the cache to what --keep says, by default to nothing, and give the space back.

What is used least goes first. Nothing is lost but time: the next start fetches again.
The server must not run; it keeps the cache below its size by itself.`,
		Example: "  thaw cache prune --keep 2GiB",
		RunE: func(cmd *cobra.Command, _ []string) error {
			keepBytes := int64(0)
			if keep != "" && keep != "0" {
				n, err := daemon.ParseSize(keep)
				if err != nil {
					return usage{fmt.Errorf("--keep: %w", err)}
				}
				keepBytes = n
			}
			o, err := where.cacheOptions()
			if err != nil {
				return err
			}
			return pruneCache(cmd, &out, o, keepBytes)
		},
	}
	cmd.Flags().StringVar(&keep, "keep", "0", "how much to keep, as 2GiB")
	out.register(cmd)
	return cmd
}

func pruneCache(cmd *cobra.Command, out *output, o cache.Options, keepBytes int64) (err error) {
	if _, err := cache.Inspect(o.Dir); err != nil {
		return err // rather than make one
	}
	c, err := cache.Open(o)
	if errors.Is(err, kind.InUse) {
		return fmt.Errorf("%w: stop the thaw server first, or give it a smaller size and start it again", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, err := c.Prune(keepBytes); err != nil {
		return err
	}
	return printCache(cmd, out, c.Stat().Contents)
}
