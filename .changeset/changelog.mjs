// The changelog format of Changesets without its lists of updated dependencies, because all packages share one version.
import format from '@changesets/cli/changelog'

export default { ...format, getDependencyReleaseLine: () => '' }
