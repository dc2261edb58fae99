"""Packaging of mmdet_lt; imports neither torch nor the package itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What `mim` looks for in <package>/.mim.
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def read_version() -> str:
    """Read the version as text: importing the package would need its dependencies."""
    text = (ROOT / 'mmdet_lt' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.M).group(1)


def read_requirements(name: str) -> list[str]:
    """Return the requirement lines of ``requirements/<name>.txt``."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


class BuildWithMim(build_py):
    """Put configs and tools into ``mmdet_lt/.mim``: copies in a wheel, links in the checkout."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, 'editable_mode', False)
        target = (ROOT if editable else Path(self.build_lib).resolve()) / 'mmdet_lt' / '.mim'
        for name in MIM_FILES:
            source, copy = ROOT / name, target / name
            if not source.exists():
                continue
            target.mkdir(parents=True, exist_ok=True)
            if copy.is_symlink() or copy.is_file():
                copy.unlink()
            elif copy.is_dir():
                shutil.rmtree(copy)
            if editable:
                copy.symlink_to(Path('..', '..', name), target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, copy)


def read_readme() -> str:
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='mmdet_lt',
    version=read_version(),
    description='Long-tail object detection for MMDetection',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10,<3.13',
    packages=find_packages(include=['mmdet_lt', 'mmdet_lt.*']),
    include_package_data=True,
    exclude_package_data={'': ['*.py[cod]', '__pycache__/*']},
    install_requires=read_requirements('runtime'),
    extras_require={
        # Either the original packages or their maintained fork; pip cannot express the choice.
        'stock': ['mmcv>=2.0.0,<2.2.0', 'mmengine>=0.10.0,<1.0.0', 'mmdet>=3.3.0,<3.4.0'],
        'onedl': ['onedl-mmcv>=2.3', 'onedl-mmengine>=0.10.8', 'onedl-mmdetection>=3.5'],
        'dev': read_requirements('dev'),
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
